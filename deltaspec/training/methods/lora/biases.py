"""Biases that are trained beside LoRA's factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaspec.training.sites.attachment import make_parameter


class Biases(nn.Module):
    """At one site: ``shift`` (n_out,) of B, scaled with it, and ``own`` (n_out,) in place of the base's; None or both.

    Parameters
    ----------
    matrix : Tensor, (n_out, n_in)
        The base's, whose device they get.
    own : Tensor, (n_out,), optional
        The base's bias, where one is trained in its place.
    scaling : float, optional
        The factors', where B has a bias.
    """

    def __init__(self, matrix: Tensor, *, own: Tensor | None, scaling: float | None) -> None:
        super().__init__()
        self.scaling = scaling or 0.0
        self.shift = None if scaling is None else make_parameter((len(matrix),), matrix)
        self.own = None if own is None else make_parameter((len(matrix),), matrix, lambda t: t.copy_(own.detach()))

    def add(self, change: Tensor, base: nn.Module, *, weight: float) -> Tensor:
        """Return a change of outputs (…, n_out) with what they add to it."""
        if self.shift is not None:
            change = change + weight * self.scaling * self.shift
        if self.own is not None:
            change = change + weight * (self.own - base.bias)  # type: ignore[operator]
        return change

    def join(self, bias: Tensor | None, *, weight: float) -> Tensor | None:
        """Return the base's bias (n_out,), or None, with what they make of it."""
        if self.own is not None and bias is not None:
            bias = torch.lerp(bias, self.own, weight)
        if self.shift is not None:
            shift = weight * self.scaling * self.shift
            bias = shift if bias is None else bias + shift
        return bias
