"""Adapters to be written: a base of zeros, modules with random factors, and what the files then hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deltaspec.io.open import open_plain
from deltaspec.io.peft_writer import PeftForm, plan_adapter, write_adapter
from deltaspec.types import AdapterModule, Checkpoint
from tests.families import write


def checkpoint(folder: Path, names: dict[str, tuple[int, ...]], **config: Any) -> Checkpoint:
    found = open_plain(write(folder, {name: torch.zeros(shape) for name, shape in names.items()}, config))
    assert isinstance(found, Checkpoint)
    return found


def module(
    path: str, d_out: int = 5, d_in: int = 4, *, kind: str = "linear", k: int = 2, **fields: Any
) -> AdapterModule:
    generator = torch.Generator().manual_seed(len(path))
    stack = (fields["experts"],) if fields.get("experts") else ()
    lora_A, lora_B = (torch.randn(*stack, *shape, generator=generator) for shape in ((k, d_in), (d_out, k)))
    return AdapterModule(path, kind, (d_out, d_in), fields.pop("rank", k), lambda: (lora_A, lora_B), **fields)


def stored(base: Checkpoint, modules: list[AdapterModule], folder: Path, **options: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    write_adapter(folder, modules, options.pop("full", []), base=base, form=PeftForm(**{"dtype": "fp32", **options}))
    found = load_file(folder / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in found)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in found.items()}


def config_of(base: Checkpoint, modules: list[AdapterModule], **options: Any) -> dict[str, Any]:
    return plan_adapter(
        modules, options.pop("full", []), base=base, form=PeftForm(**{"dtype": "fp32", **options})
    ).config
