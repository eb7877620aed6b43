"""A tiny model, two small data sets, and trainings of a few steps on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from deltaspec.options import DataOptions, DataSources, LoopOptions, Recipe, RunOptions
from deltaspec.workflows.training.read_data import read_split
from deltaspec.workflows.training.train import train
from tests.tiny_models import WORDS, build, save, write_text

CAUSAL = DataOptions(task="causal-lm", holdout=0.25, length=16)
CLASSES = DataOptions(holdout=0.25)
TASKS = {"bert": ("data.csv", CLASSES), "llama": ("text.txt", CAUSAL), "tied": ("text.txt", CAUSAL)}


def write_classes(path: Path, *, names: tuple[str, ...] = ("neg", "pos"), rows: int = 40, seed: int = 0) -> Path:
    """Texts of six words; each class has words of its own."""
    generator = random.Random(seed)
    lines = ["text,label"]
    for number in range(rows):
        label = number % len(names)
        words = WORDS[label :: len(names)]
        text = " ".join(generator.choice(words) for _ in range(generator.randint(3, 9)))
        lines.append(f"{text},{names[label]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_case(root: Path, *names: str) -> Path:
    """Models by their names in tiny_models, data.csv, other.csv with three classes, and text.txt."""
    for name in names:
        model = build(name)
        save(model.bfloat16() if name == "tied" else model, root / name)
    write_classes(root / "data.csv")
    write_classes(root / "other.csv", names=("a", "b", "c"), rows=60, seed=1)
    write_text(root / "text.txt", lines=60)
    return root


def run(root: Path, out: Path, model: str = "bert", **given: Any) -> dict[str, Any]:
    """Train for six steps of two batches of four; LoopOptions and RunOptions by the names of their fields."""
    data, options = TASKS.get(model, TASKS["bert"])
    loop = {"lr": 1e-2, "steps": 6, "batch": 4, "accumulate": 2, **given.pop("loop", {})}
    sources = DataSources(given.pop("data", root / data), given.pop("eval_data", None), given.pop("forget", None))
    calls = {name: given.pop(name) for name in ("overwrite", "progress") if name in given}
    running = RunOptions(**{"device": "cpu", **given.pop("run", {})})
    recipe = Recipe(sources, data=given.pop("data_options", options), loop=LoopOptions(**loop), run=running, **given)
    return train(root / model, out, recipe, **calls)


def read_lines(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def held_out(root: Path, model: str, out: Any) -> float:
    """The held-out loss of a saved model by transformers' own loss, one text at a time."""
    data, options = TASKS[model]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / model)
    _, held = read_split(str(root / data), options, tokenizer)
    losses, counts = [], []
    for number in range(len(held)):
        batch = held.batch(torch.tensor([number]), pad=0)
        with torch.no_grad():
            losses.append(out(**batch).loss.item())
        counts.append(batch["labels"].shape[-1] - 1 if options.task == "causal-lm" else 1)
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
