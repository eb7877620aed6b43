"""Tiny checkpoints, one per family, with the names and shapes that real models have (families.toml says whence)."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Family:
    name: str
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def expand(lines: str) -> dict[str, tuple[int, ...]]:
    """Read lines "a.{0,1}.b 3 4" as names and shapes: a.0.b and a.1.b, each (3, 4)."""
    tensors = {}
    for line in lines.split("\n"):
        if not line:
            continue
        template, *shape = line.split()
        pieces = [piece.split(",") for piece in re.split(r"[{}]", template)]
        for combination in itertools.product(*pieces):
            tensors["".join(combination)] = tuple(int(size) for size in shape)
    return tensors


def _load() -> dict[str, Family]:
    blocks = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {name: Family(name, block["config"], expand(block["tensors"])) for name, block in blocks.items()}


FAMILIES: dict[str, Family] = _load()


def random_state(family: Family, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Standard normal tensors of the family's names and shapes; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = family.tensors.items()
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes}


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, shards: int = 1) -> Path:
    """Write config.json and model.safetensors, or shards and their index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(itertools.islice(tensors.items(), shard, None, shards))
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
