"""What can be chosen of LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option


@documented
@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What LoRA adds."""

    rank: int = option(8, "Rank r of each update.")
    alpha: float = option(16.0, "α: the update is scaled by α/r, or by α/√r.")
    rslora: bool = option(False, "Scale by α/√r instead of α/r (Kalajdzievski, arXiv:2312.03732).")
    dora: bool = option(
        False, "Learn the length of each output's row apart from its direction (Liu et al., arXiv:2402.09353)."
    )
    init: str = option(
        "kaiming",
        "How it starts: kaiming, at ΔW = 0 with a random A; or pissa, with the base's top singular directions, which "
        "the base lacks meanwhile (Meng et al., arXiv:2404.02948). Embeddings always start as under kaiming.",
    )
    dropout: float = option(0.0, "Share of the update's inputs left out in training; embeddings have none.")
    bias: str = option(
        "none", "Biases of the base trained beside: none, lora_only (of adapted modules), or all (but those of heads)."
    )
    lora_bias: bool = option(False, "Train a bias of B too, scaled with it.")
    lr_ratio: float = option(
        1.0, "λ of LoRA+: the learning rate of B is λ times that of A (Hayou et al., arXiv:2402.12354)."
    )
    patterns: Mapping[str, tuple[int, float]] = field(
        default_factory=dict, metadata={"about": "Rank and α of single sites by name, where they are others."}
    )

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
