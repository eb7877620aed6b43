"""Write the archive of the current format version; run once for each version, never again for an old one.

    .venv-test/bin/python -m tests.archives.make [PART …]

Parts are run, adapters, merges, trainings and steps; without one all are written. Expected values of the run are
NumPy's, float64, from the matrices before they were stored; those of a training are what the version that trained it
reported.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deltaspec
from deltaspec.store.run import VERSION
from tests.families import write

FOLDER = Path(__file__).parent / f"v{VERSION}"
PLACE = "archive"  # stands for the folder in which everything was made
NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
DATA = deltaspec.DataOptions(holdout=0.25)
LOOP = deltaspec.LoopOptions(lr=1e-2, steps=4, batch=4)
RUNNING = deltaspec.RunOptions(device="cpu", checkpoint_every=2)
TRAININGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method_options": {"rank": 2}},
    "rates": {"method_options": {"rank": 2}, "rates": (1e-2, 1e30)},
}


def make_pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three matrices and a norm, and the same after a change."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(8, 6, generator=generator) for name in NAMES}
    tuned = {name: t + 0.1 * torch.randn(8, 6, generator=generator) for name, t in base.items()}
    base["model.norm.weight"], tuned["model.norm.weight"] = torch.ones(6), torch.full((6,), 1.5)
    return base, tuned


def settle(folder: Path, scratch: str) -> None:
    """Take this machine out of every text: its paths, and what it is."""
    for file in (file for file in folder.rglob("*") if file.suffix in (".json", ".csv")):
        text = file.read_text(encoding="utf-8").replace(scratch, PLACE)
        if file.name == "manifest.json":
            text = json.dumps({**json.loads(text), "machine": {}}, indent=1)
        file.write_text(text, encoding="utf-8")


def run(scratch: Path) -> None:
    """Write a run directory with two vectors of each matrix, and the singular values that it must hold."""
    base, tuned = make_pair()
    sides = [str(write(scratch / side, state, {})) for side, state in (("base", base), ("tuned", tuned))]
    options = deltaspec.AnalyzeOptions(device="cpu", vectors=2, spectra=("delta", "base"))
    deltaspec.analyze(*sides, FOLDER / "run", options=options)
    settle(FOLDER / "run", str(scratch))
    expected = {}
    for name in NAMES:
        for key, matrix in ((name, tuned[name].double() - base[name].double()), (f"{name}#base", base[name].double())):
            expected[key] = np.linalg.svd(matrix.numpy(), compute_uv=False).tolist()
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def adapters(scratch: Path) -> None:
    """Write a pair, adapters of its change by two policies, and their sum."""
    base, tuned = make_pair()
    grown = torch.cat([tuned[NAMES[0]], torch.ones(2, 6)])  # a vocabulary with two new rows
    sides = [
        str(write(scratch / side, state, {"model_type": "llama"}))
        for side, state in (("base", base), ("tuned", tuned | {NAMES[0]: grown}))
    ]
    analysis = deltaspec.AnalyzeOptions(device="cpu", vocab="common")
    energy, rank, params = (
        deltaspec.RankOptions("energy", (0.9,)),
        deltaspec.RankOptions("rank", (2,)),
        deltaspec.RankOptions("params", (60,)),
    )
    for name, ranks, extras in (("energy", energy, "all"), ("rank", rank, "none"), ("params", params, "none")):
        options = deltaspec.ExtractOptions(ranks, deltaspec.FormOptions(extras=extras), analysis)
        deltaspec.extract(*sides, scratch / "extracted" / name, options=options)
    made = [(scratch / "extracted" / name, weight) for name, weight in (("rank", 1.0), ("params", 0.5))]
    deltaspec.combine(made, scratch / "extracted" / "combined", options=deltaspec.ExtractOptions(rank))
    for name in ("base", "tuned", "extracted"):
        shutil.copytree(scratch / name, FOLDER / ("pair" if name != "extracted" else "") / name, dirs_exist_ok=True)
    settle(FOLDER / "extracted", str(scratch))


def merges(scratch: Path) -> None:
    """Write what a merge of the archived sum of adapters says of itself, without its weights; needs adapters."""
    for name in ("pair/base", "extracted/combined"):
        shutil.copytree(FOLDER / name, scratch / name)
    merge_sum(scratch, scratch / "merged")
    (FOLDER / "merged").mkdir(exist_ok=True)
    shutil.copyfile(scratch / "merged" / "deltaspec.json", FOLDER / "merged" / "deltaspec.json")
    settle(FOLDER / "merged", str(scratch))


def merge_sum(place: Path, out: Path) -> None:
    """Merge so little of the sum of adapters of ``place`` into its base that rounding loses some of it."""
    deltaspec.merge(place / "pair/base", [(place / "extracted/combined", 1e-6)], out)


def trainings(scratch: Path) -> None:
    """Write a base with data, finished trainings of it, one that was stopped, and a comparison."""
    from tests.tiny_models import build, save  # they need transformers, which reading the archive does not
    from tests.workflows.training.train_case import write_classes

    save(build("bert", num_hidden_layers=1), scratch / "bert")
    settings = scratch / "bert" / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # which all versions know
    settings.write_text(json.dumps(named, indent=2))
    write_classes(scratch / "data.csv")
    write_classes(scratch / "other.csv", names=("a", "b", "c"), rows=60, seed=1)
    for name in TRAININGS:
        train(scratch, name, scratch / "trainings" / name)
    stop_after(3, lambda tick: train(scratch, "lora", scratch / "trainings" / "stopped", progress=tick))
    folders = [scratch / "trainings" / name for name in ("full", "lora")]
    deltaspec.compare(folders, scratch / "comparison", options=deltaspec.CompareOptions(directions=2, device="cpu"))
    for name in ("runs", "matrices"):
        shutil.rmtree(scratch / "comparison" / name)
    for folder in (scratch / "trainings" / "rates").glob("lr-*"):
        shutil.rmtree(folder)
    for name in ("bert", "trainings", "comparison"):
        shutil.copytree(scratch / name, FOLDER / name, dirs_exist_ok=True)
    for name in ("data.csv", "other.csv"):
        shutil.copyfile(scratch / name, FOLDER / name)
    for name in ("trainings", "comparison"):
        settle(FOLDER / name, str(scratch))


def train(
    place: Path,
    name: str,
    out: Path,
    *,
    loop: deltaspec.LoopOptions = LOOP,
    progress: Callable[[object], None] | None = None,
) -> dict[str, Any]:
    """Train the base of ``place`` for four steps as TRAININGS says, or go on with what lies in ``out``."""
    sources = deltaspec.DataSources(place / "data.csv", forget=place / "other.csv")
    recipe = deltaspec.Recipe(sources, data=DATA, loop=loop, run=RUNNING, **TRAININGS[name])
    return dict(deltaspec.train(place / "bert", out, recipe, progress=progress))


def stop_after(step: int, work: Callable[[Callable[[object], None]], object]) -> None:
    """Do work that a KeyboardInterrupt ends at a step."""

    def tick(found: object) -> None:
        if getattr(found, "step", 0) == step:
            raise KeyboardInterrupt

    try:
        work(tick)
    except KeyboardInterrupt:
        return
    message = f"It ended before step {step}."
    raise RuntimeError(message)


def steps(scratch: Path) -> None:
    """Write the trajectory of the archived full training; needs trainings."""
    for name in ("bert", "trainings"):
        shutil.copytree(FOLDER / name, scratch / name)
    options = deltaspec.AnalyzeOptions(device="cpu", include="attention")
    deltaspec.trajectory(scratch / "bert", [scratch / "trainings" / "full"], FOLDER / "trajectory", options=options)
    settle(FOLDER / "trajectory", str(scratch))


PARTS: dict[str, Callable[[Path], None]] = {
    "run": run,
    "adapters": adapters,
    "merges": merges,
    "trainings": trainings,
    "steps": steps,
}


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[name](Path(scratch).resolve())


if __name__ == "__main__":
    main()
