"""VeRA: ΔW = diag(λ_b) B diag(λ_d) A, where A and B are random, frozen and shared by all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.options.methods.shared_factors import VeraOptions
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment, Method, fill, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at, refuse_embeddings
from deltaspec.training.sites.site import Site

SHARED = ("base_model.vera_A", "base_model.vera_B")
VECTORS = ("vera_lambda_b", "vera_lambda_d")


def draw_projections(rank: int, sides: tuple[int, int], *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw A and B uniformly within ±√(6 / fan-in), Kaiming's bound, as PEFT does from the same seed.

    Parameters
    ----------
    rank : int
    sides : (rows of B, columns of A)
    seed : int

    Returns
    -------
    Tensor, (rank, columns), and Tensor, (rows, rank), float32
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, sides[1]), (sides[0], rank))
    first, second = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape in shapes
        for bound in [math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))]  # in PEFT's order: bits count here
    )
    return first, second


class ScaledOptions(Protocol):
    """What the updates need of a method's options."""

    @property
    def rank(self) -> int:
        """Of the projections."""

    @property
    def d_initial(self) -> float:
        """Every λ_d at the start."""

    @property
    def dropout(self) -> float:
        """Share of the inputs left out in training."""


class ScaledUpdate(Update):
    """λ_b (d_out,) and λ_d (r,) of one site, between projections A (r, a) and B (b, r) that all sites share.

    A layer with smaller sides takes their first columns and rows; where a side is larger, they are repeated along it.
    """

    names = VECTORS
    shared_names = SHARED

    def __init__(self, site: Site, shared: tuple[nn.Parameter, nn.Parameter], options: ScaledOptions) -> None:
        super().__init__(site)
        self.A, self.B = shared
        self.dropout = options.dropout
        self.lambda_b = make_parameter((site.shape[0],), self.B)
        self.lambda_d = make_parameter((options.rank,), self.B, lambda t: t.fill_(options.d_initial))

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · λ_b ⊙ B(λ_d ⊙ A x); neither product nor repetition is ever formed as a matrix."""
        (d_out, d_in), rows, columns = self.site.shape, self.B.shape[0], self.A.shape[1]
        x = F.dropout(x.to(self.lambda_d.dtype), self.dropout, self.training)
        if d_in > columns:
            x = F.pad(x, (0, -d_in % columns)).reshape(*x.shape[:-1], -1, columns).sum(-2)
        h = F.linear(x, self.A[:, : x.shape[-1]].to(x.device)) * (self.lambda_d * weight)
        out = F.linear(h, self.B[:d_out].to(x.device))
        if d_out > rows:
            out = out.repeat(*[1] * (out.ndim - 1), -(-d_out // rows))[..., :d_out]
        return y + (out * self.lambda_b).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return λ_d ⊙ A and λ_b ⊙ B, as wide and as tall as the layer."""
        d_out, d_in = self.site.shape
        wide = self.A.repeat(1, -(-d_in // self.A.shape[1]))[:, :d_in].to(self.lambda_d.device)
        tall = self.B.repeat(-(-d_out // self.B.shape[0]), 1)[:d_out].to(self.lambda_b.device)
        return wide * self.lambda_d[:, None], tall * self.lambda_b[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Return both vectors."""
        return dict(zip(self.names, (self.lambda_b, self.lambda_d), strict=True))

    def shared(self) -> dict[str, Tensor]:
        """Return both projections."""
        return dict(zip(self.shared_names, (self.A, self.B), strict=True))


class VeraAttachment(Attachment):
    """VeRA, whose projections need not be stored."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in; projections that are not among them stay as their seed gave them."""
        drawn = () if any(name in tensors for name in self.shared) else self.shared
        fill({name: tensor for name, tensor in self.state().items() if name not in drawn}, tensors)

    def released(self) -> dict[str, Tensor]:
        """Return the vectors, and the projections where they are to be saved."""
        left = () if self.options.save_projection else self.shared
        return {name: tensor for name, tensor in self.state().items() if name not in left}

    def stored(self) -> int:
        """Count what a released adapter holds, projections included where they are saved."""
        return sum(tensor.numel() for tensor in self.released().values())


def attach(model: nn.Module, sites: Sequence[Site], options: VeraOptions, *, name: str, seed: int) -> Attachment:
    """Put VeRA at every site; nothing but the projections is random, and they have a seed of their own."""
    del seed
    refuse_embeddings(sites, "vera")
    sides = (max(site.shape[0] for site in sites), max(site.shape[1] for site in sites))
    like = base_matrix(module_at(model, sites[0].path), sites[0])
    if like.is_meta:
        drawn = (torch.empty(options.rank, sides[1], device="meta"), torch.empty(sides[0], options.rank, device="meta"))
    else:
        drawn = draw_projections(options.rank, sides, seed=options.projection_prng_key)
    first, second = (nn.Parameter(tensor.to(like.device), requires_grad=False) for tensor in drawn)
    updates = [ScaledUpdate(site, (first, second), options) for site in sites]
    return VeraAttachment(model, updates, name=name, method="vera", options=options)


def to_peft(options: VeraOptions) -> dict[str, Any]:
    """Return the fields of PEFT's VeraConfig."""
    return {
        "r": options.rank,
        "d_initial": options.d_initial,
        "projection_prng_key": options.projection_prng_key,
        "save_projection": options.save_projection,
        "vera_dropout": options.dropout,
        "bias": "none",
    }


def from_peft(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> VeraOptions:
    """Read PEFT's VeraConfig; whether projections are saved, the file itself tells."""
    return VeraOptions(
        config["r"],
        config.get("d_initial", 0.1),
        config["projection_prng_key"],
        SHARED[0] in shapes,
        config.get("vera_dropout", 0.0),
    )


METHOD = Method(
    title="VeRA",
    reference="Kopiczko, Blankevoort, Asano, ICLR 2024, arXiv:2310.11454",
    options=VeraOptions,
    attach=attach,
    peft="VERA",
    to_peft=to_peft,
    from_peft=from_peft,
)
