"""Adapters that PEFT itself makes, to be merged."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .running import load

if TYPE_CHECKING:
    from .checks import Specimen


def all_linear(specimen: Specimen, out: Path) -> Any:
    """Target every linear layer but the output, as PEFT chooses them."""
    return _make(specimen, out, target_modules="all-linear")


def some_leaves(specimen: Specimen, out: Path) -> Any:
    """Target a few kinds of modules by their last name: linear layers, an embedding, a convolution."""
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for path, module in load(specimen.cls, specimen.base).named_modules():
        kinds[path.rsplit(".", 1)[-1]].add(_kind(module))
    leaves = defaultdict(list)
    for leaf, (kind, *others) in kinds.items():
        if kind and not others and not leaf.isdigit():
            leaves[kind].append(leaf)
    beside = leaves["embedding"][:1] + leaves["conv"][:1]
    try:
        return _make(specimen, out, target_modules=leaves["linear"][::2] + beside)
    except ValueError:  # what is fused in the running model goes together or not at all
        return _make(specimen, out, target_modules=leaves["linear"] + beside)


def stacked_experts(specimen: Specimen, out: Path) -> Any:
    """Target the bare parameters that hold a matrix for each expert."""
    names = [
        name
        for name, parameter in load(specimen.cls, specimen.base).named_parameters()
        if parameter.ndim == 3 and "expert" in name and not name.endswith(("weight", "bias"))
    ]
    if not names:
        return None
    return _make(
        specimen, out, target_modules=[], target_parameters=sorted({".".join(name.split(".")[-2:]) for name in names})
    )


def _kind(module: nn.Module) -> str:
    if type(module) in (nn.Linear, Conv1D):
        return "linear"
    if type(module) is nn.Embedding:
        return "embedding"
    return "conv" if type(module) in (nn.Conv1d, nn.Conv2d) and module.groups == 1 else ""


def _make(specimen: Specimen, out: Path, **targets: Any) -> Any:
    settings = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **targets)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(specimen.cls, specimen.base), settings).eval()
        model.save_pretrained(out)
    return model


MAKERS = {"all-linear": all_linear, "leaves": some_leaves, "experts": stacked_experts}
