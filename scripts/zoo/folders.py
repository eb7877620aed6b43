"""Base and fine-tune on disk: every float tensor of a model changed, both saved as transformers saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
SIZE, CHANGE = 0.15, 0.03


def write_pair(cls: Any, model: Any, folder: Path) -> tuple[Path, Path]:
    """Fill the model from seeds and save it, change all of it and save it again.

    Both are loaded and saved once more: some classes change what they load (a padding row to zero), and what is stored
    must be what runs.
    """
    base, tuned = folder / "base", folder / "tuned"
    fill(model, seed=0)
    _save(cls, model, base)
    change(model, seed=1)
    _save(cls, model, tuned)
    return base, tuned


def _save(cls: Any, model: Any, folder: Path) -> None:
    drawn = folder.with_name(f"{folder.name}-drawn")
    model.save_pretrained(drawn)
    cls.from_pretrained(drawn).save_pretrained(folder)
    shutil.rmtree(drawn)


def _floats(model: Any) -> list[tuple[str, Tensor]]:
    """Every float tensor of the state once, however many names share it."""
    found: dict[tuple[int, int], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            found.setdefault((tensor.data_ptr(), tensor.numel()), (name, tensor))
    return list(found.values())


def fill(model: Any, *, seed: int) -> None:
    """Draw every float tensor: matrices and biases around 0, norms around 1, variances above 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _floats(model):
        drawn = SIZE * torch.randn(tensor.shape, generator=generator)
        if "running_var" in name:
            drawn = 1 + drawn.abs()
        elif tensor.ndim <= 1 and not name.endswith(("bias", "running_mean")):
            drawn = 1 + drawn
        tensor.copy_(drawn.to(tensor.dtype))


def change(model: Any, *, seed: int) -> None:
    """Add noise to every float tensor; to variances what keeps them positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in _floats(model):
        drawn = CHANGE * torch.randn(tensor.shape, generator=generator)
        tensor.add_((drawn.abs() if "running_var" in name else drawn).to(tensor.dtype))


def read(folder: Path) -> State:
    """Read every stored tensor of a folder."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def write_wanted(base: Path, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Write a folder with the base's config and these tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in base.glob("*.json"):
        if not file.name.endswith("index.json"):
            shutil.copy(file, folder / file.name)
    named = [file.name for file in base.glob("*.safetensors")]
    file = folder / (named[0] if len(named) == 1 else "model.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
