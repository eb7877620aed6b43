"""What bottlenecks of every kind have in common: their activations, and where they are placed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaspec.errors import OptionError
from deltaspec.training.sites.site import Site
from deltaspec.training.sites.targets import GROUPS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def place(sites: Sequence[Site], placement: str, *, cross: bool) -> list[Site]:
    """Keep the sites of a placement, in their order.

    Parameters
    ----------
    sites : sequence of Site
    placement : str
        ``attention``, ``mlp``, or ``both``, which keeps sites outside either too.
    cross : bool
        Keep those of a decoder's attention to the encoder.

    Raises
    ------
    OptionError
        If none is left.
    """
    roles = GROUPS.get(placement)
    kept = [s for s in sites if (roles is None or s.key.role in roles) and (cross or s.key.stack != "cross")]
    if not kept:
        message = (
            f"--placement {placement} leaves no layer of --targets, which are "
            f"{', '.join(sorted({site.key.role for site in sites}))}: pass other targets, --placement both, or --cross "
            "for a decoder's attention to the encoder."
        )
        raise OptionError(message)
    return kept
