"""Fine-tunes of tiny transformers models, their extraction, and NumPy's float64 view of what was stored."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

import deltaspec
from deltaspec.cli.main import cli
from deltaspec.options import AnalyzeOptions, ExtractOptions, FormOptions, RankOptions
from tests.families import write
from tests.oracle.models import build
from tests.oracle.parity import attach, distance, load, outputs

CPU = AnalyzeOptions(device="cpu", workers=1)
FULL = 40  # a rank above every true one in these models


@dataclass(frozen=True)
class Pair:
    """A base and its fine-tune, in memory and on disk."""

    base: Path
    tuned: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def write(self, folder: Path, *, kept: str) -> Path:
        """Write the base with only those changes whose names ``kept`` finds."""
        state = {name: self.after[name] if re.search(kept, name) else t for name, t in self.before.items()}
        return write(folder, state, config_of(self.base))

    def change(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor's ΔW in float64."""
        return self.after[name].double().numpy() - self.before[name].double().numpy()


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def save(name: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a tiny model as transformers does, or in its layout in memory where the family's name says so."""
    model = build(name)
    if name.endswith("_stacked"):
        model.config.architectures = [type(model).__name__]
        write(folder, model.state_dict(), model.config.to_dict())
    else:
        model.save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


def low_rank(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> Tensor:
    """A float64 update of this rank, or a dense one of a vector."""
    if len(shape) == 1:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    left = torch.randn(*shape[:-1], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(*shape[:-2], rank, shape[-1], generator=generator, dtype=torch.float64)
    return left @ right / rank


def fine_tune(name: str, folder: Path, changed: str, *, rank: int = 3, scale: float = 0.2) -> Pair:
    """Write a model, and one in which every tensor whose name ``changed`` finds moved."""
    base, before = save(name, folder / "base")
    generator = torch.Generator().manual_seed(5)
    after = {
        key: (t.double() + scale * low_rank(tuple(t.shape), rank, generator)).to(t.dtype)
        if re.search(changed, key)
        else t
        for key, t in before.items()
    }
    return Pair(base, write(folder / "tuned", after, config_of(base)), before, after)


def settings(policy: str = "rank", amount: float = FULL, **form: Any) -> ExtractOptions:
    return ExtractOptions(RankOptions(policy, (amount,)), FormOptions(**{"dtype": "fp32", **form}), CPU)


def extract(pair: Pair, out: Path, policy: str = "rank", amount: float = FULL, **form: Any) -> dict[str, Any]:
    """Extract one adapter in fp32, and return its report."""
    (report,) = deltaspec.extract(pair.base, pair.tuned, out, options=settings(policy, amount, **form)).values()
    return report  # type: ignore[no-any-return]


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter, PEFT's prefix taken off."""
    found = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


def adapter_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def effect(base: Path, adapter: Path, wanted: Path) -> tuple[float, float]:
    """How far base + adapter in PEFT, and the base alone, are from a model's outputs."""
    goal = outputs(load(wanted))
    return distance(outputs(attach(base, adapter)), goal), distance(outputs(load(base)), goal)


def command(*words: object) -> Result:
    """Run ``deltaspec`` as a person would."""
    return CliRunner().invoke(cli, [str(word) for word in (*words, "--quiet")])


def contents(*folders: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}


def relative(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """‖found - wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
