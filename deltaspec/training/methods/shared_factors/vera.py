"""VeRA: ΔW = diag(λ_b) B diag(λ_d) A, where A and B are random, frozen and shared by all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltaspec.options.methods.shared_factors import VeraOptions
from deltaspec.training.methods.shared_factors.projections import ScaledUpdate
from deltaspec.training.sites.attachment import Attachment, Method, fill
from deltaspec.training.sites.model_sites import base_matrix, module_at, refuse_embeddings
from deltaspec.training.sites.site import Site
from deltaspec.types.methods import PeftConfig

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

    Examples
    --------
    >>> first, second = draw_projections(2, (3, 6), seed=0)
    >>> first.shape, second.shape, bool(first.abs().max() <= 1)
    (torch.Size([2, 6]), torch.Size([3, 2]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, sides[1]), (sides[0], rank))
    first, second = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape in shapes
        for bound in [math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))]  # in PEFT's order: bits count here
    )
    return first, second


class VeraUpdate(ScaledUpdate):
    """The vectors of one site, under PEFT's names."""

    names = VECTORS
    shared_names = SHARED


class VeraAttachment(Attachment):
    """VeRA, whose projections need not be stored."""

    options: VeraOptions

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
    """Put VeRA at every site; nothing but the projections is random, and they have a seed of their own.

    Arguments are as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If a site is an embedding.
    """
    del seed
    refuse_embeddings(sites, "vera")
    sides = (max(site.shape[0] for site in sites), max(site.shape[1] for site in sites))
    like = base_matrix(module_at(model, sites[0].path), sites[0])
    if like.is_meta:
        drawn = (torch.empty(options.rank, sides[1], device="meta"), torch.empty(sides[0], options.rank, device="meta"))
    else:
        drawn = draw_projections(options.rank, sides, seed=options.projection_prng_key)
    first, second = (nn.Parameter(tensor.to(like.device), requires_grad=False) for tensor in drawn)
    updates = [VeraUpdate(site, (first, second), options) for site in sites]
    return VeraAttachment(model, updates, name=name, method="vera", options=options)


def to_peft(options: VeraOptions) -> PeftConfig:
    """Return the fields of PEFT's VeraConfig."""
    return {
        "r": options.rank,
        "d_initial": options.d_initial,
        "projection_prng_key": options.projection_prng_key,
        "save_projection": options.save_projection,
        "vera_dropout": options.dropout,
        "bias": "none",
    }


def from_peft(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> VeraOptions:
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
