"""What VeRA and Tied-LoRA have in common: two projections that all layers share, and two vectors of each layer."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import make_parameter
from deltaspec.training.sites.site import Site


def apply_projections(x: Tensor, shared: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor]) -> Tensor:
    """Compute λ_b ⊙ B(λ_d ⊙ A x); neither product nor repetition is ever formed as a matrix.

    Parameters
    ----------
    x : Tensor, (…, d_in)
    shared : Tensor, (r, a), and Tensor, (b, r)
        A and B, of which a layer with smaller sides takes the first columns and rows; along a larger side they are
        repeated. They are moved to x's device.
    scales : Tensor, (r,), and Tensor, (d_out,)
        λ_d and λ_b.

    Returns
    -------
    Tensor, (…, d_out)

    References
    ----------
    Kopiczko, Blankevoort, Asano, VeRA, ICLR 2024, equation 2.

    Examples
    --------
    >>> import torch
    >>> shared = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [-1.0]])
    >>> apply_projections(torch.tensor([[1.0, 1.0, 1.0]]), shared, (torch.tensor([2.0]), torch.ones(2)))
    tensor([[ 8., -8.]])
    """
    (first, second), (lambda_d, lambda_b) = shared, scales
    d_in, d_out, rows, columns = x.shape[-1], len(lambda_b), second.shape[0], first.shape[1]
    if d_in > columns:
        x = F.pad(x, (0, -d_in % columns)).reshape(*x.shape[:-1], -1, columns).sum(-2)
    h = F.linear(x, first[:, : x.shape[-1]].to(x.device)) * lambda_d
    out = F.linear(h, second[:d_out].to(x.device))
    if d_out > rows:
        out = out.repeat(*[1] * (out.ndim - 1), -(-d_out // rows))[..., :d_out]
    return out * lambda_b


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

    names: tuple[str, str]
    shared_names: tuple[str, str]

    def __init__(self, site: Site, shared: tuple[nn.Parameter, nn.Parameter], options: ScaledOptions) -> None:
        super().__init__(site)
        self.A, self.B = shared
        self.dropout = options.dropout
        self.lambda_b = make_parameter((site.shape[0],), self.B)
        self.lambda_d = make_parameter((options.rank,), self.B, lambda t: t.fill_(options.d_initial))

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y + weight · λ_b ⊙ B(λ_d ⊙ A x)."""
        del base
        x = F.dropout(x.to(self.lambda_d.dtype), self.dropout, self.training)
        added = apply_projections(x, (self.A, self.B), (self.lambda_d * weight, self.lambda_b))
        return y + added.to(y.dtype)

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
