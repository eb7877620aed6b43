"""The options of LoRA and its relatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaspec.errors import OptionError


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What LoRA adds.

    Parameters
    ----------
    rank : int
        r of each update.
    alpha : float
        α: the update is scaled by α/r, or by α/√r.
    rslora : bool
        Scale by α/√r (Kalajdzievski, arXiv:2312.03732).
    dora : bool
        Learn the length of each output's row apart from its direction (Liu et al., arXiv:2402.09353).
    init : str
        ``kaiming`` starts at ΔW = 0 with a random A; ``pissa`` with the base's top singular directions, which the base
        lacks meanwhile (Meng et al., arXiv:2404.02948); embeddings always start as under ``kaiming``.
    dropout : float
        Of the update's input, in training mode; embeddings have none.
    bias : str
        Biases trained beside: ``none``, ``lora_only`` (of adapted modules) or ``all`` (but those of heads).
    lora_bias : bool
        Train a bias of B, scaled with it.
    lr_ratio : float
        λ of LoRA+: learning rate of B = λ · that of A (Hayou et al., arXiv:2402.12354).
    patterns : mapping of str to (int, float)
        Rank and α of single sites by name, where they are others.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    dropout: float = 0.0
    bias: str = "none"
    lora_bias: bool = False
    lr_ratio: float = 1.0
    patterns: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for rank, alpha in ((self.rank, self.alpha), *self.patterns.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                message = f"--rank is {rank}: expected a whole number from 1."
                raise OptionError(message)
            if not (math.isfinite(alpha) and alpha > 0):
                message = f"--alpha is {alpha}: expected a number above 0."
                raise OptionError(message)
        if not 0 <= self.dropout < 1:
            message = f"--dropout is {self.dropout}: expected 0 or more, and less than 1."
            raise OptionError(message)
        if not (math.isfinite(self.lr_ratio) and self.lr_ratio > 0):
            message = f"--lr-ratio is {self.lr_ratio}: expected a number above 0; 1 is plain LoRA, LoRA+ takes 16."
            raise OptionError(message)
        for name, value, known in (
            ("init", self.init, ("kaiming", "pissa")),
            ("bias", self.bias, ("none", "lora_only", "all")),
        ):
            if value not in known:
                message = f"--{name} is '{value}': expected one of {', '.join(known)}."
                raise OptionError(message)
        if self.lora_bias and (self.dora or self.init != "kaiming"):
            message = "--lora-bias goes with neither --dora nor --init pissa: leave one of them out."
            raise OptionError(message)

    def rank_at(self, name: str) -> int:
        """Return the rank of one site."""
        return self.patterns[name][0] if name in self.patterns else self.rank

    def scaling_at(self, name: str) -> float:
        """Return α/r, or α/√r, of one site."""
        rank, alpha = self.patterns.get(name, (self.rank, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)
