"""Bottleneck adapters: a small two-layer network after a sublayer (series), or beside a matrix (parallel)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import OptionError
from deltaspec.options.methods.bottleneck import ParallelOptions, SeriesOptions
from deltaspec.training.methods.bottleneck.placement import ACTIVATIONS, place
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import Attachment, Method, make_parameter
from deltaspec.training.sites.model_sites import base_matrix, module_at
from deltaspec.training.sites.site import Site


def run_bottleneck(
    x: Tensor, down: Tensor, up: Tensor, *, activation: str, biases: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Run the two layers: f(x Dᵀ + b) Uᵀ + c.

    Parameters
    ----------
    x : Tensor, (…, n)
    down : Tensor, (r, n)
    up : Tensor, (m, r)
    activation : str
        f, a name in ACTIVATIONS.
    biases : Tensor (r,) or None, Tensor (m,) or None
        b and c.

    Returns
    -------
    Tensor, (…, m)

    References
    ----------
    Houlsby et al., ICML 2019, section 2.1.

    Examples
    --------
    >>> import torch
    >>> down, up = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [3.0]])
    >>> run_bottleneck(torch.tensor([[5.0, 2.0]]), down, up, activation="relu", biases=(None, None))
    tensor([[3., 9.]])
    """
    return F.linear(ACTIVATIONS[activation](F.linear(x, down, biases[0])), up, biases[1])


class BottleneckUpdate(Update):
    """down (r, n) as a linear layer's usual start, up (m, r) zero, so that nothing changes at the start."""

    def __init__(
        self, site: Site, base: nn.Module, options: SeriesOptions | ParallelOptions, generator: torch.Generator
    ) -> None:
        super().__init__(site)
        self.options, self.series = options, isinstance(options, SeriesOptions)
        like, r = base_matrix(base, site), options.bottleneck
        d_out, d_in = site.shape
        width = d_out if self.series else d_in
        bound = 1 / math.sqrt(width)
        self.down = make_parameter((r, width), like, lambda t: t.uniform_(-bound, bound, generator=generator))
        self.up = make_parameter((d_out, r), like)
        self.down_bias = make_parameter((r,), like) if options.bias else None
        self.up_bias = make_parameter((d_out,), like) if options.bias else None
        self.norm: nn.Parameter | None = None
        self.norm_bias: nn.Parameter | None = None
        if isinstance(options, SeriesOptions) and options.norm:
            self.norm = make_parameter((width,), like, lambda t: t.fill_(1))
            self.norm_bias = make_parameter((width,), like)

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · scale · the bottleneck of y (series) or of x (parallel)."""
        del base
        h = (y if self.series else x).to(self.down.dtype)
        if self.norm is not None:
            h = F.layer_norm(h, (h.shape[-1],), self.norm, self.norm_bias)
        biases = (self.down_bias, self.up_bias)
        added = run_bottleneck(h, self.down, self.up, activation=self.options.activation, biases=biases)
        return y + (weight * self.options.scale * added).to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the layers, their biases and the norm."""
        named = {
            "adapter_down.weight": self.down,
            "adapter_down.bias": self.down_bias,
            "adapter_up.weight": self.up,
            "adapter_up.bias": self.up_bias,
            "adapter_norm.weight": self.norm,
            "adapter_norm.bias": self.norm_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def attach_series(
    model: nn.Module, sites: Sequence[Site], options: SeriesOptions, *, name: str, seed: int
) -> Attachment:
    """Put a bottleneck after every site of the placement; arguments as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If the placement leaves no site.
    """
    kept = place(sites, options.placement, cross=options.cross)
    return Attachment(model, _updates(model, kept, options, seed), name=name, method="series", options=options)


def attach_parallel(
    model: nn.Module, sites: Sequence[Site], options: ParallelOptions, *, name: str, seed: int
) -> Attachment:
    """Put a bottleneck beside every site; arguments as of every method's attach, see Method.

    Raises
    ------
    OptionError
        If a site is an embedding, whose inputs are no numbers.
    """
    if tables := [site for site in sites if site.kind == "embedding"]:
        message = (
            f"--method parallel takes a layer's inputs, but those of '{tables[0].name}' are token ids: leave it out of "
            "--targets."
        )
        raise OptionError(message)
    return Attachment(model, _updates(model, sites, options, seed), name=name, method="parallel", options=options)


def _updates(
    model: nn.Module, sites: Sequence[Site], options: SeriesOptions | ParallelOptions, seed: int
) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [BottleneckUpdate(site, module_at(model, site.path), options, generator) for site in sites]


SERIES = Method(
    title="Series adapter",
    reference="Houlsby et al., ICML 2019, arXiv:1902.00751",
    options=SeriesOptions,
    attach=attach_series,
    space="activation",
    sites="o_proj,down_proj",
)
PARALLEL = Method(
    title="Parallel adapter",
    reference="He et al., ICLR 2022, arXiv:2110.04366; Hu et al., EMNLP 2023, arXiv:2304.01933",
    options=ParallelOptions,
    attach=attach_parallel,
    space="activation",
    sites="up_proj,down_proj",
)
