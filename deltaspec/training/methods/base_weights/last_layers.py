"""The last blocks of the base and its task head; everything before them stays."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from deltaspec.errors import OptionError
from deltaspec.options.methods.base_weights import LastLayersOptions
from deltaspec.training.methods.base_weights.own import BaseAttachment
from deltaspec.training.sites.attachment import Method
from deltaspec.training.sites.model_sites import HEADS, identify_parameters
from deltaspec.training.sites.site import Site
from deltaspec.types import MatrixKey

POOLER = re.compile(r"(?:^|\.)pooler\.")


def attach(
    model: nn.Module, sites: Sequence[Site], options: LastLayersOptions, *, name: str, seed: int
) -> BaseAttachment:
    """Train the last blocks and the head; arguments as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If the model has fewer blocks, or nothing is left to train.
    """
    del sites, seed
    found = identify_parameters(model)
    keys = {n: parts[0].key for n, parts in found.matrices.items()} | found.vectors
    ends: dict[str, int] = {}
    for key in keys.values():
        if key.depth is not None:
            ends[key.stack] = max(ends.get(key.stack, 0), key.depth + 1)
    if options.blocks > max(ends.values(), default=0):
        message = f"--blocks is {options.blocks}, but the model has {max(ends.values(), default=0)} blocks: pass less."
        raise OptionError(message)
    last = [n for n, key in keys.items() if key.depth is not None and key.depth >= ends[key.stack] - options.blocks]
    head = [n for n, key in keys.items() if options.head and _in_head(model, n, key)]
    if not last and not head:
        message = (
            f"--blocks is 0, and {type(model).__name__} has no head of its own (one that is tied to the embedding "
            "stays): pass --blocks 1 or more."
        )
        raise OptionError(message)
    return BaseAttachment(model, [*last, *head], name=name, method="last_layers", options=options)


def _in_head(model: nn.Module, name: str, key: MatrixKey) -> bool:
    body = str(getattr(model, "base_model_prefix", ""))
    if POOLER.search(name):
        return True
    if body and hasattr(model, body):
        return not name.startswith(f"{body}.")
    return key.role in HEADS


METHOD = Method(
    title="Last layers",
    reference="Hu et al., ICLR 2022, arXiv:2106.09685, section 5.1 (FT-Top2)",
    options=LastLayersOptions,
    attach=attach,
    space="base",
    sites="",
)
