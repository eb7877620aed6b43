"""Tied-LoRA: ΔW = diag(λ_b) B diag(λ_d) A, where all layers train one A and one B."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from deltaspec.options.methods.shared_factors import TiedOptions
from deltaspec.training.methods.shared_factors.projections import ScaledUpdate
from deltaspec.training.sites.attachment import Attachment, Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, check_ranks, module_at, refuse_embeddings
from deltaspec.training.sites.site import Site

SHARED = ("base_model.tied_A", "base_model.tied_B")
VECTORS = ("tied_lambda_b", "tied_lambda_d")


class TiedUpdate(ScaledUpdate):
    """The vectors of one site, under names of their own."""

    names = VECTORS
    shared_names = SHARED


def attach(model: nn.Module, sites: Sequence[Site], options: TiedOptions, *, name: str, seed: int) -> Attachment:
    """Put Tied-LoRA at every site: one pair of d rows and columns, d the largest of the layers' smaller sides.

    That is the model's width; layers that are wider (FFN) repeat the pair, as published counts require. Arguments are
    as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If a site is an embedding, or the rank exceeds its sides.
    """
    refuse_embeddings(sites, "tied")
    check_ranks(sites, options.rank)
    width = max(min(site.shape) for site in sites)
    generator = torch.Generator().manual_seed(seed)
    like = base_matrix(module_at(model, sites[0].path), sites[0])
    first, second = (
        make_parameter(shape, like, lambda t: t.uniform_(-bound(t), bound(t), generator=generator))
        for shape in ((options.rank, width), (width, options.rank))
    )
    updates = [TiedUpdate(site, (first, second), options) for site in sites]
    return Attachment(model, updates, name=name, method="tied", options=options)


def bound(factor: torch.Tensor) -> float:
    """Return Kaiming's bound of a factor's values, √(6 / fan-in).

    Parameters
    ----------
    factor : Tensor, (rows, fan-in)

    Examples
    --------
    >>> bound(torch.empty(2, 6))
    1.0
    """
    return math.sqrt(6 / factor.shape[1])


METHOD = Method(
    title="Tied-LoRA",
    reference="Renduchintala, Konuk, Kuchaiev, NAACL 2024, arXiv:2311.09578",
    options=TiedOptions,
    attach=attach,
)
