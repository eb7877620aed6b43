"""Full fine-tuning: every weight of the base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaspec.options.methods.base_weights import FullOptions
from deltaspec.training.methods.base_weights.own import BaseAttachment
from deltaspec.training.sites.attachment import Method
from deltaspec.training.sites.model_sites import base_parameters
from deltaspec.training.sites.site import Site


def attach(model: nn.Module, sites: Sequence[Site], options: FullOptions, *, name: str, seed: int) -> BaseAttachment:
    """Train every parameter, embeddings and normalisations too; tied ones once.

    Arguments are as of every method's attach, see Method; sites and seed change nothing.
    """
    del sites, seed
    return BaseAttachment(model, base_parameters(model), name=name, method="full", options=options)


METHOD = Method(
    title="Full fine-tuning",
    reference="Howard and Ruder, ACL 2018, arXiv:1801.06146",
    options=FullOptions,
    attach=attach,
    space="base",
    sites="",
)
