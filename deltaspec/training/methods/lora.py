"""LoRA: ΔW = scaling · B·A beside a frozen matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.training.adapted import Update
from deltaspec.training.attachment import Attachment, Method, check_ranks, make_parameter
from deltaspec.training.sites import Site, base_matrix, module_at


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What LoRA adds."""

    rank: int = 8
    alpha: float = 16.0

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.rank


class LoraUpdate(Update):
    """lora_A (r, d_in) and lora_B (d_out, r) of one site."""

    def __init__(self, site: Site, base: nn.Module, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__(site)
        self.options = options
        weight = base_matrix(base, site)
        (d_out, d_in), r = site.shape, options.rank
        bound = 1 / math.sqrt(d_in)
        self.lora_A = make_parameter((r, d_in), weight, lambda t: t.uniform_(-bound, bound, generator=generator))
        self.lora_B = make_parameter((d_out, r), weight)

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · scaling · x Aᵀ Bᵀ; B·A is never formed."""
        h = F.linear(x.to(self.lora_A.dtype), self.lora_A) * (weight * self.options.scaling)
        return y + F.linear(h, self.lora_B).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and scaling · B."""
        return self.lora_A, self.options.scaling * self.lora_B

    def tensors(self) -> dict[str, Tensor]:
        """Return both factors under PEFT's names."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


def attach(model: nn.Module, sites: Sequence[Site], options: LoraOptions, *, name: str, seed: int) -> Attachment:
    """Put LoRA at every site."""
    check_ranks(sites, options.rank)
    generator = torch.Generator().manual_seed(seed)
    updates = [LoraUpdate(site, module_at(model, site.path), options, generator) for site in sites]
    return Attachment(model, updates, name=name, method="lora", options=options)


def to_peft(options: LoraOptions) -> dict[str, Any]:
    """Return the fields of PEFT's LoraConfig."""
    return {"r": options.rank, "lora_alpha": options.alpha}


def from_peft(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> LoraOptions:
    """Read PEFT's LoraConfig."""
    del shapes
    return LoraOptions(config["r"], config["lora_alpha"])


METHOD = Method(
    title="LoRA",
    reference="Hu et al., ICLR 2022, arXiv:2106.09685",
    options=LoraOptions,
    attach=attach,
    peft="LORA",
    to_peft=to_peft,
    from_peft=from_peft,
)
