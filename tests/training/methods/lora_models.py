"""LoRA on tiny models: each variant attached, its trained numbers moved, the model's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaspec.options.methods.lora import LoraOptions
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods.lora.lora import attach
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.targets import choose_sites
from tests.tiny_models import VOCAB

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa dora": {"init": "pissa", "dora": True},
    "biases": {"lora_bias": True, "bias": "lora_only"},
    "all biases": {"bias": "all"},
}


def start(
    model: Any, targets: str = "all", *, name: str = "default", seed: int = 0, split: bool = False, **options: Any
) -> Attachment:
    sites = choose_sites(model, TargetOptions(targets, split=split))
    return attach(model, sites, LoraOptions(**{"rank": 3, "alpha": 7.0, **options}), name=name, seed=seed)


def move(attachment: Attachment, size: float = 0.2) -> Attachment:
    """Change everything that is trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in attachment.trained().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return attachment


def run(model: Any) -> Tensor:
    ids = torch.randint(0, len(VOCAB), (3, 7), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids).logits


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return run(model)
