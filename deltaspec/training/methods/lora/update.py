"""What LoRA adds at one site, linear or embedding; and at a module that has only a bias to train."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.options.methods.lora import LoraOptions
from deltaspec.training.methods.lora.adapted_linear import Factors, adapted_linear
from deltaspec.training.methods.lora.biases import Biases
from deltaspec.training.methods.lora.dora import Lengths, dense_change
from deltaspec.training.methods.lora.pissa import Start
from deltaspec.training.sites.adapted import Update
from deltaspec.training.sites.attachment import make_parameter
from deltaspec.training.sites.model_sites import base_bias, base_matrix
from deltaspec.training.sites.site import Site
from deltaspec.types import LowRankDelta

Draw = Callable[[Tensor], object] | None


class LoraUpdate(Update):
    """A (r, n_in) and B (n_out, r) of one site, with the parts that options add to them.

    Attributes
    ----------
    lora_A, lora_B : nn.Parameter
        ΔW = scaling · B·A where no other part is there.
    start : Start or None
        PiSSA's first factors, whose product the base lacks meanwhile.
    lengths : Lengths or None
        DoRA's lengths of rows.
    biases : Biases
        Those that are trained beside; none of them unless asked for.
    """

    names = ("lora_A.weight", "lora_B.weight")
    transposed = False  # whether (n_out, n_in) is the other way round than the site's shape

    def __init__(self, site: Site, base: nn.Module, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__(site)
        self.rank, self.dropout, self.scaling = (
            options.rank_at(site.name),
            options.dropout,
            options.scaling_at(site.name),
        )
        matrix = self.matrix(base)
        n_out, n_in = matrix.shape
        draw_A, draw_B = self.draws(n_in, generator)
        self.lora_A = make_parameter((self.rank, n_in), matrix, draw_A)
        self.lora_B = make_parameter((n_out, self.rank), matrix, draw_B)
        own = getattr(base, "bias", None) if site.whole and options.bias != "none" else None
        self.biases = Biases(matrix, own=own, scaling=self.scaling if options.lora_bias else None)
        self.start: Start | None = None
        self.lengths = Lengths(matrix) if options.dora else None
        self.reads_base = options.dora

    def matrix(self, base: nn.Module) -> Tensor:
        """Return the base's (n_out, n_in), without gradient."""
        matrix = base_matrix(base, self.site).detach()
        return matrix.T if self.transposed else matrix

    def draws(self, n_in: int, generator: torch.Generator) -> tuple[Draw, Draw]:
        """Say how A and B are drawn at the start; None leaves zeros, so that nothing changes yet."""
        raise NotImplementedError

    def project(self, x: Tensor, lora_A: Tensor, base: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the inputs as the update sees them, and A times them (…, r)."""
        raise NotImplementedError

    def strip_bias(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return the base's outputs without its bias, for inputs that ``project`` returned."""
        raise NotImplementedError

    def both(self) -> Factors:
        """Return A and B, with PiSSA's subtracted start as a second half: (2r, n_in) and (n_out, 2r)."""
        pair = (self.lora_A, self.lora_B) if self.start is None else self.start.subtract(self.lora_A, self.lora_B)
        return Factors(*pair, self.scaling)

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return y with the update; a dropped input reaches DoRA's base part too, as in PEFT."""
        factors = self.both()
        x, h = self.project(x, factors.lora_A, base)
        change = F.linear(h * (weight * self.scaling), factors.lora_B)
        if self.lengths is not None:
            stretch = self.lengths.stretch(self.matrix(base), factors)
            change = change * stretch + weight * (stretch - 1) * self.strip_bias(x, y, base)
        return (y + self.biases.add(change, base, weight=weight)).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A and scaling · B in the orientation of ΔW; None for DoRA, whose change is of full rank."""
        if self.lengths is not None:
            return None
        lora_A, lora_B, scaling = self.both()
        return (scaling * lora_B.T, lora_A.T) if self.transposed else (lora_A, scaling * lora_B)

    def delta(self, base: nn.Module) -> LowRankDelta | Tensor | None:
        """Return ΔW against the base's own weight in float64: factors, or dense for DoRA."""
        lora_A, lora_B = (factor.detach().double() for factor in self.both()[:2])
        if self.lengths is None:
            lora_B = self.scaling * lora_B  # in float64: a third as scale would cost half of the digits
            return LowRankDelta(lora_B.T, lora_A.T) if self.transposed else LowRankDelta(lora_A, lora_B)
        change = dense_change(self.matrix(base), self.lengths.magnitude, Factors(lora_A, lora_B, self.scaling))
        return change.T if self.transposed else change

    def tensors(self) -> dict[str, Tensor]:
        """Return what is trained under PEFT's names, and PiSSA's start."""
        named: dict[str, Tensor | None] = {
            self.names[0]: self.lora_A,
            self.names[1]: self.lora_B,
            "lora_B.bias": self.biases.shift,
            "lora_magnitude_vector": None if self.lengths is None else self.lengths.magnitude,
            "base_layer.bias": self.biases.own,
            "pissa_A": None if self.start is None else self.start.start_A,
            "pissa_B": None if self.start is None else self.start.start_B,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @torch.no_grad()
    def released(self) -> dict[str, Tensor]:
        """Return its tensors in PEFT's format, of an adapter of the base as it is: of rank 2r under PiSSA."""
        found = {name: tensor for name, tensor in self.tensors().items() if not name.startswith("pissa_")}
        return found | dict(zip(self.names, self.both()[:2], strict=True))


class LinearLora(LoraUpdate):
    """LoRA beside a linear layer or Conv1D, or a part of one; only here can the start be PiSSA's."""

    def __init__(self, site: Site, base: nn.Module, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__(site, base, options, generator)
        self.plain = site.whole and (type(base) is nn.Linear or site.kind == "conv1d")
        if options.init == "pissa":
            self.start = Start(self.matrix(base), self.both())

    def draws(self, n_in: int, generator: torch.Generator) -> tuple[Draw, Draw]:
        """Draw A uniformly within ±1/√n_in."""
        bound = 1 / math.sqrt(n_in)
        return lambda t: t.uniform_(-bound, bound, generator=generator), None

    def project(self, x: Tensor, lora_A: Tensor, base: nn.Module) -> tuple[Tensor, Tensor]:
        """Return x after dropout, in A's dtype unless autocast chooses it, and x Aᵀ."""
        del base
        exact = x if torch.is_autocast_enabled(x.device.type) else x.to(lora_A.dtype)
        x = F.dropout(exact, self.dropout, self.training)
        return x, F.linear(x, lora_A)

    def strip_bias(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y without its bias; where inputs were dropped, x Wᵀ anew."""
        if self.dropout and self.training:
            return F.linear(x, self.matrix(base).to(x.dtype))
        bias = base_bias(base, self.site)
        return y if bias is None else y - bias

    def fuse(self, x: Tensor, *, base: nn.Module, weight: float) -> Tensor | None:
        """Return the layer's outputs with the update in one operation, where nothing needs them without it."""
        if not self._stands_for(base, x) or (self.lengths is not None and weight != 1):
            return None
        factors, matrix = self.both(), self.matrix(base)
        bias = self.biases.join(getattr(base, "bias", None), weight=weight)
        stretch = None if self.lengths is None else self.lengths.stretch(matrix, factors)
        return adapted_linear(x, matrix, bias, factors._replace(scaling=weight * self.scaling), stretch=stretch)

    def _stands_for(self, base: nn.Module, x: Tensor) -> bool:
        """Tell whether one operation may stand for the layer: plain, unseen, of one dtype, and nothing dropped."""
        kernel = base.weight
        assert isinstance(kernel, Tensor)
        seen = base._forward_hooks or base._forward_pre_hooks or kernel.requires_grad
        alike = x.dtype == kernel.dtype == self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type)
        dropped = self.dropout and self.training
        return self.plain and alike and not (seen or dropped or torch.compiler.is_compiling())


class EmbeddingLora(LoraUpdate):
    """LoRA beside an embedding (V, d): n_in is V and n_out is d, as PEFT has it; A starts at zero instead of B."""

    names = ("lora_embedding_A", "lora_embedding_B")
    transposed = True

    def __init__(self, site: Site, base: nn.Module, options: LoraOptions, generator: torch.Generator) -> None:
        super().__init__(site, base, options, generator)
        self.doubled = options.init == "pissa"

    def draws(self, n_in: int, generator: torch.Generator) -> tuple[Draw, Draw]:
        """Draw B normally."""
        del n_in
        return None, lambda t: t.normal_(generator=generator)

    def project(self, x: Tensor, lora_A: Tensor, base: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the token ids, and their columns of A, scaled as the base scales its own rows."""
        h = F.embedding(x, lora_A.T, base.padding_idx)  # type: ignore[arg-type]
        return x, h * getattr(base, "embed_scale", 1.0)

    def strip_bias(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return y: embeddings have no bias."""
        del x, base
        return y

    @torch.no_grad()
    def released(self) -> dict[str, Tensor]:
        """Return its tensors in PEFT's format; beside PiSSA's of rank 2r, filled up with zeros."""
        found = super().released()
        if self.doubled:
            found[self.names[0]] = F.pad(self.lora_A, (0, 0, 0, self.rank))
            found[self.names[1]] = F.pad(self.lora_B, (0, self.rank))
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
