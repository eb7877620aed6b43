"""What LoRA adds at one site: scaling · B·A, DoRA's lengths, biases; and at a module that has only a bias to train."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.options.methods.lora import LoraOptions
from deltaspec.training.methods.lora.adapted_linear import adapted_linear
from deltaspec.training.methods.lora.dora import dense_change, row_lengths, square_rows
from deltaspec.training.methods.lora.pissa import principal_factors
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import make_parameter
from deltaspec.training.sites.model_sites import base_bias, base_matrix
from deltaspec.training.sites.site import Site
from deltaspec.types import LowRankDelta


class LoraUpdate(Update):
    """A (r, n_in) and B (n_out, r) of one site; of an embedding (V, d) n_in is V and n_out is d, as PEFT has it.

    ``start`` are PiSSA's first factors: the base acts without their product. They are subtracted beside the trained
    ones, as a second half of the factors, so that the base's own weight stays what it was.
    """

    start_A: Tensor | None
    start_B: Tensor | None
    squares: Tensor | None

    def __init__(self, site: Site, base: nn.Module, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__(site)
        self.embeds, self.dropout = site.kind == "embedding", options.dropout
        self.rank, self.scaling = options.rank_at(site.name), options.scaling_at(site.name)
        matrix = self._matrix(base)
        n_out, n_in = matrix.shape
        bound = 1 / math.sqrt(n_in)
        uniform = lambda t: t.uniform_(-bound, bound, generator=generator)  # noqa: E731
        normal = lambda t: t.normal_(generator=generator)  # noqa: E731
        self.lora_A = make_parameter((self.rank, n_in), matrix, None if self.embeds else uniform)
        self.lora_B = make_parameter((n_out, self.rank), matrix, normal if self.embeds else None)
        self.shift = make_parameter((n_out,), matrix) if options.lora_bias else None
        bias = getattr(base, "bias", None) if site.whole and options.bias != "none" else None
        self.bias = None if bias is None else make_parameter((n_out,), matrix, lambda t: t.copy_(bias.detach()))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        if options.init == "pissa" and not self.embeds:
            self._start(matrix)
        self.register_buffer("squares", None, persistent=False)
        self.magnitude: nn.Parameter | None = None
        self.reads_base = options.dora
        if options.dora:
            self.squares = torch.empty(n_out, device="meta") if matrix.is_meta else square_rows(matrix).float()
            squares = self.squares
            self.magnitude = make_parameter((n_out,), matrix, lambda t: t.copy_(squares.sqrt()))

    @torch.no_grad()
    def _start(self, matrix: Tensor) -> None:
        """Set PiSSA's factors, and keep them."""
        if not matrix.is_meta:
            found = principal_factors(matrix, self.rank, scaling=self.scaling)
            self.lora_A.copy_(found[0])
            self.lora_B.copy_(found[1])
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def _matrix(self, base: nn.Module) -> Tensor:
        """Return the base's (n_out, n_in)."""
        matrix = base_matrix(base, self.site).detach()
        return matrix.T if self.embeds else matrix

    def both(self) -> tuple[Tensor, Tensor]:
        """Return A and B, with PiSSA's subtracted start as a second half: (2r, n_in) and (n_out, 2r)."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def stretch(self, base: nn.Module) -> Tensor | None:
        """Return DoRA's factor of each output (n_out,): magnitude / ‖row‖, the length without gradient; else None."""
        if self.magnitude is None or self.squares is None:
            return None
        lora_A, lora_B = self.both()
        matrix = self._matrix(base).to(lora_A.dtype)
        lengths = row_lengths(matrix, self.squares, lora_A=lora_A, lora_B=lora_B, scaling=self.scaling)
        return self.magnitude / lengths

    def fuse(self, x: Tensor, *, base: nn.Module, weight: float) -> Tensor | None:
        """Return a plain linear layer's outputs with the update, where nothing asks for its outputs without."""
        kernel, bias = base.weight, getattr(base, "bias", None)
        assert isinstance(kernel, Tensor)
        plain = type(base) is nn.Linear or self.site.kind == "conv1d"
        watched = base._forward_hooks or base._forward_pre_hooks or kernel.requires_grad
        same = x.dtype == kernel.dtype == self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type)
        dropped = self.dropout and self.training
        if not plain or watched or not same or dropped or not self.site.whole or torch.compiler.is_compiling():
            return None
        stretch = self.stretch(base)
        if stretch is not None and weight != 1:
            return None
        lora_A, lora_B = self.both()
        if self.bias is not None and bias is not None:
            bias = torch.lerp(bias, self.bias, weight)
        if self.shift is not None:
            shift = weight * self.scaling * self.shift
            bias = shift if bias is None else bias + shift
        matrix, scaling = self._matrix(base), weight * self.scaling
        return adapted_linear(x, matrix, bias, lora_A=lora_A, lora_B=lora_B, scaling=scaling, stretch=stretch)

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y with the update; a dropped input reaches DoRA's base part too, as in PEFT."""
        lora_A, lora_B = self.both()
        if self.embeds:
            h = F.embedding(x, lora_A.T, base.padding_idx) * getattr(base, "embed_scale", 1.0)  # type: ignore[arg-type]
        else:
            exact = x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype)
            x = F.dropout(exact, self.dropout, self.training)
            h = F.linear(x, lora_A)
        change = F.linear(h * (weight * self.scaling), lora_B)
        stretch = self.stretch(base)
        if stretch is not None:
            change = change * stretch + weight * (stretch - 1) * self._unbiased(x, y, base)
        if self.shift is not None:
            change = change + weight * self.scaling * self.shift
        if self.bias is not None:
            change = change + weight * (self.bias - base.bias)  # type: ignore[operator]
        return (y + change).to(y.dtype)

    def _unbiased(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return the base's outputs without its bias, for a dropped input anew."""
        if self.dropout and self.training and not self.embeds:
            return F.linear(x, self._matrix(base).to(x.dtype))
        bias = base_bias(base, self.site)
        return y if bias is None else y - bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A and scaling · B in the orientation of ΔW; None for DoRA, whose change is of full rank."""
        if self.magnitude is not None:
            return None
        lora_A, lora_B = self.both()
        return (self.scaling * lora_B.T, lora_A.T) if self.embeds else (lora_A, self.scaling * lora_B)

    def delta(self, base: nn.Module) -> LowRankDelta | Tensor | None:
        """Return ΔW against the base's own weight in float64: factors, or dense for DoRA."""
        lora_A, lora_B = (factor.detach().double() for factor in self.both())
        if self.magnitude is None:
            lora_B = self.scaling * lora_B  # in float64: a third as scale would cost half of the digits
            return LowRankDelta(lora_B.T, lora_A.T) if self.embeds else LowRankDelta(lora_A, lora_B)
        change = dense_change(self._matrix(base), self.magnitude, lora_A=lora_A, lora_B=lora_B, scaling=self.scaling)
        return change.T if self.embeds else change

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained under PEFT's names, and PiSSA's start."""
        a, b = ("lora_embedding_A", "lora_embedding_B") if self.embeds else ("lora_A.weight", "lora_B.weight")
        named = {
            a: self.lora_A,
            b: self.lora_B,
            "lora_B.bias": self.shift,
            "lora_magnitude_vector": self.magnitude,
            "base_layer.bias": self.bias,
            "pissa_A": self.start_A,
            "pissa_B": self.start_B,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @torch.no_grad()
    def released(self, *, pissa: bool) -> dict[str, Tensor]:
        """Return its tensors in PEFT's format, of an adapter of the base as it is: of rank 2r under PiSSA."""
        found = {name: tensor for name, tensor in self.tensors().items() if not name.startswith("pissa_")}
        if pissa and self.embeds:
            found["lora_embedding_A"] = F.pad(self.lora_A, (0, 0, 0, self.rank))
            found["lora_embedding_B"] = F.pad(self.lora_B, (0, self.rank))
        elif pissa:
            found["lora_A.weight"], found["lora_B.weight"] = self.both()
        return found


class BiasUpdate(Update):
    """The bias (d,) of a module without LoRA, trained beside the base's."""

    def __init__(self, site: Site, base: nn.Module) -> None:
        super().__init__(site)
        bias = base.bias
        assert isinstance(bias, Tensor)
        self.bias = make_parameter(tuple(bias.shape), bias, lambda t: t.copy_(bias.detach()))

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y with this bias in place of the base's."""
        del x
        return (y + weight * (self.bias - base.bias)).to(y.dtype)  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        """Return the bias under the name that it has in the base."""
        return {"bias": self.bias}
