"""Cost of training and of using adapters beside PEFT 0.21 and full fine-tuning, in one run.

    python scripts/bench_training.py [--rounds 7] [--only full,lora] [--quick] [--out figures/bench_training]

Llama of hidden 512, 8 layers, feed-forward 1376, vocabulary 8192, float32, one thread. Training: batch 4 × 256, AdamW,
adapters on all linear layers of the blocks; both tools get the same first values, data and loop, and must have the
same losses. Using: a batch of 16 × 256 whose rows use 16 adapters of rank 16, in inference. Times are CPU seconds of
one step, all variants in turn within one process; ratios are taken within a round, then the median over rounds, with
the smallest and largest. Peak memory is that of a process of its own for three steps, above that of one that makes the
same imports and steps of a tiny model. --quick is a smoke run on a small model: its numbers mean nothing.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_analyze import ROOT, measure, write_tables

sys.path.insert(0, str(ROOT))
SIZES = {  # hidden, feed-forward, layers, heads, vocabulary, training batch, inference batch, length
    "whole": (512, 1376, 8, 8, 8192, 4, 16, 256),
    "quick": (128, 352, 2, 4, 512, 2, 4, 64),
    "tiny": (32, 32, 1, 2, 64, 2, 2, 8),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # by row: method, our options, PEFT's
    "lora": ("lora", {"rank": 16, "alpha": 32.0}, {"r": 16, "lora_alpha": 32}),
    "dora": ("lora", {"rank": 16, "alpha": 32.0, "dora": True}, {"r": 16, "lora_alpha": 32, "use_dora": True}),
    "vera": ("vera", {"rank": 256}, {"r": 256}),
    "vblora": (
        "vblora",
        {"rank": 4, "vectors": 256, "vector_length": 32},
        {"r": 4, "num_vectors": 256, "vector_length": 32},
    ),
}
TRAINING = ["full", *(f"{name} {tool}" for name in METHODS for tool in ("deltaspec", "peft"))]
USING = ["base forward", "mixed deltaspec", "mixed peft"]
GOALS = [  # figure, row, against, at most
    ("step", "lora deltaspec", "full", 0.80),
    ("step", "lora deltaspec", "lora peft", 0.95),
    ("peak", "lora deltaspec", "lora peft", 0.85),
    ("step", "dora deltaspec", "dora peft", 0.90),
    ("step", "mixed deltaspec", "base forward", 1.60),
]


def make_model(size: str) -> Any:
    """Return a seeded Llama in training mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, vocabulary, _, _, length = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def attach_ours(model: Any, row: str, *, name: str = "default", seed: int = 0) -> Any:
    """Attach one of our methods to all linear layers, the base frozen."""
    from deltaspec.options.training import TargetOptions
    from deltaspec.training.methods import METHODS as OURS
    from deltaspec.training.sites.attachment import freeze
    from deltaspec.training.sites.targets import choose_sites

    method, options, _ = METHODS[row]
    freeze(model)
    sites = choose_sites(model, TargetOptions(targets="all"))
    chosen = OURS[method].options(**options)
    return OURS[method].attach(model, sites, chosen, name=name, seed=seed)


def peft_config(row: str) -> Any:
    """Return PEFT's config of a row."""
    import peft

    method, _, options = METHODS[row]
    cls = {"lora": peft.LoraConfig, "vera": peft.VeraConfig, "vblora": peft.VBLoRAConfig}[method]
    return cls(target_modules=LINEAR, **options)


def training_step(variant: str, size: str, *, same: bool) -> tuple[Callable[[], float], int]:
    """Build a model and return one step of training as a function that returns the loss, and how much is trained.

    ``same`` copies our first values into PEFT's model, so that both take the same steps.
    """
    import torch

    row, _, tool = variant.partition(" ")
    model = make_model(size)
    if tool == "deltaspec":
        parameters = list(attach_ours(model, row).trained().values())
    elif tool == "peft":
        import peft

        model = peft.get_peft_model(model, peft_config(row)).train()
        if same:
            copy_values(attach_ours(make_model(size), row), model)
        parameters = [p for p in model.parameters() if p.requires_grad]
    else:
        parameters = list(model.parameters())
    *_, vocabulary, batch, _, length = SIZES[size]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, sum(p.numel() for p in parameters)


def copy_values(attachment: Any, model: Any, name: str = "default") -> None:
    """Copy our values into a PEFT model."""
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(model, attachment.released(), adapter_name=name)
    if found.unexpected_keys:
        sys.exit(f"PEFT does not know our {found.unexpected_keys[:3]}.")


def using_step(variant: str, size: str, *, same: bool) -> tuple[Callable[[], Any], int]:
    """Build a model with one adapter a row and return its forward, logits out, and the numbers in adapters.

    ``same`` copies our values into PEFT's model; without, they are of the same size.
    """
    import torch

    *_, vocabulary, _, batch, length = SIZES[size]
    model, generator = make_model(size).eval(), torch.Generator().manual_seed(2)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    names, extra = [f"a{number}" for number in range(batch)], {}
    if variant == "mixed deltaspec" or same:
        ours = model if variant == "mixed deltaspec" else make_model(size)
        attachments = [attach_ours(ours, "lora", name=name, seed=seed) for seed, name in enumerate(names)]
        with torch.no_grad():
            for parameter in (p for attachment in attachments for p in attachment.trained().values()):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    if variant == "mixed deltaspec":
        from deltaspec.training.several.mixed_batch import MixedBatch

        MixedBatch(model, attachments).select(names)
    elif variant == "mixed peft":
        import peft

        model = peft.get_peft_model(model, peft_config("lora"), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, peft_config("lora"))
        for attachment in attachments if same else ():
            copy_values(attachment, model, attachment.name)
        model.eval()
        extra = {"adapter_names": names}

    def step() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, **extra).logits

    return step, sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def build(variant: str, size: str, *, same: bool = False) -> tuple[Callable[[], Any], int]:
    """Return one step of a variant, and how many numbers its adapters have."""
    return (using_step if variant in USING else training_step)(variant, size, same=same)


def peak(variant: str, size: str) -> float:
    """Peak memory in MB of three steps in a process of their own, above one that stops after those of a tiny model."""
    command = [sys.executable, __file__, "--child", variant]
    return measure([*command, "--size", size], 1)["peak"] - measure([*command, "--size", "tiny"], 1)["peak"]


def time_steps(
    variants: list[str], size: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, Any]]:
    """Return CPU seconds of each round, how many numbers adapters have, and the last result, by variant."""
    import torch

    torch.set_num_threads(1)
    built = {variant: build(variant, size, same=True) for variant in variants}
    steps, numbers = ({variant: pair[side] for variant, pair in built.items()} for side in (0, 1))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    results: dict[str, Any] = {variant: step() for variant, step in steps.items()}  # the first is not timed
    for number in range(rounds):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            start = time.process_time()
            results[variant] = steps[variant]()
            times[variant].append(time.process_time() - start)
    for row in (*METHODS, "mixed"):
        if len({numbers[v] for v in (f"{row} deltaspec", f"{row} peft") if v in numbers}) > 1:
            sys.exit(f"{row}: the tools have adapters of different sizes: {numbers}.")
    return times, numbers, results


def agreement(results: dict[str, Any]) -> dict[str, float]:
    """Return the largest difference of both tools' last losses, or of their logits."""
    found = {}
    for row in (*METHODS, "mixed"):
        if f"{row} deltaspec" in results and f"{row} peft" in results:
            difference = results[f"{row} deltaspec"] - results[f"{row} peft"]
            found[row] = float(difference.abs().max() if hasattr(difference, "abs") else abs(difference))
    return found


def ratio(times: dict[str, list[float]], row: str, against: str) -> list[float]:
    """Return smallest, median and largest ratio of a round's times."""
    ratios = sorted(a / b for a, b in zip(times[row], times[against], strict=True))
    return [round(value, 3) for value in (ratios[0], statistics.median(ratios), ratios[-1])]


def check_goals(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, str]:
    """Return each goal of which both rows were measured, with what was."""
    said = {}
    for figure, row, against, most in GOALS:
        if row in times and against in times:
            low, found, high = ratio(times, row, against)
            if figure == "peak":
                low = found = high = round(peaks[row] / peaks[against], 3)
            said[f"{figure}: {row} / {against} ≤ {most}"] = (
                f"{'met' if found <= most else 'NOT MET'}: {found} ({low}–{high})"
            )
    return said


def print_table(rows: list[dict[str, object]]) -> None:
    """Print rows in columns."""
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def main() -> None:
    """Run the comparison and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="rows by the first word of their name, comma-separated")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench_training")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for size in ("tiny", arguments.size):
            step, _ = build(arguments.child, size)
            for _ in range(3):
                step()
        return
    size = "quick" if arguments.quick else "whole"
    variants = [v for v in TRAINING + USING if not arguments.only or v.split()[0] in arguments.only.split(",")]
    peaks = {variant: peak(variant, size) for variant in variants}  # before this process grows
    times, numbers, results = time_steps(variants, size, 2 if arguments.quick else arguments.rounds)
    rows = []
    for variant in variants:
        row: dict[str, object] = {"variant": variant, "numbers": numbers[variant]}
        low, middle, high = sorted(times[variant])[0], statistics.median(times[variant]), sorted(times[variant])[-1]
        row |= {"step": round(middle, 4), "least": round(low, 4), "most": round(high, 4)}
        row["peak MB"] = round(peaks[variant], 1)
        for against in ("full", f"{variant.split()[0]} peft", "base forward"):
            known = against in variants and (against in USING) == (variant in USING)
            label = against.split()[-1]
            row[f"step / {label}"] = ratio(times, variant, against)[1] if known else ""
            row[f"peak / {label}"] = round(peaks[variant] / peaks[against], 3) if known else ""
        rows.append(row)
    print_table(rows)
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    facts = {
        "versions": versions,
        "goals": check_goals(times, peaks),
        "largest difference of losses or logits": agreement(results),
    }
    write_tables(arguments.out, rows, facts)


if __name__ == "__main__":
    main()
