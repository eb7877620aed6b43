"""BitFit: every bias of the base, those of its layer norms too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaspec.errors import OptionError
from deltaspec.options.methods.base_weights import BitfitOptions
from deltaspec.training.methods.base_weights.own import BaseAttachment
from deltaspec.training.sites.attachment import Method
from deltaspec.training.sites.model_sites import identify_parameters
from deltaspec.training.sites.site import Site


def attach(model: nn.Module, sites: Sequence[Site], options: BitfitOptions, *, name: str, seed: int) -> BaseAttachment:
    """Train every bias; arguments as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If the model has none.
    """
    del sites, seed
    names = [bias for bias, key in identify_parameters(model).vectors.items() if key.role == "bias"]
    if not names:
        message = (
            f"--method bitfit trains biases, but {type(model).__name__} has none: "
            "choose another method, such as lora or last_layers."
        )
        raise OptionError(message)
    return BaseAttachment(model, names, name=name, method="bitfit", options=options)


METHOD = Method(
    title="BitFit",
    reference="Ben Zaken et al., ACL 2022, arXiv:2106.10199",
    options=BitfitOptions,
    attach=attach,
    space="base",
    sites="",
)
