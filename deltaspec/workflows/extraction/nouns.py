"""What an extraction is made of: its sources, what a budget bought, what is left over, and the assembly of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from deltaspec.options import ExtractOptions
from deltaspec.pairing.plan import Plan
from deltaspec.store.pieces import Pieces
from deltaspec.types import Checkpoint, ModulePair, Opened, TensorSpec


@dataclass(frozen=True, slots=True)
class Sources:
    """Both sides, their plan, and the modules that get factors; ``left`` says why the others do not."""

    base: Checkpoint
    tuned: Opened
    plan: Plan
    modules: tuple[ModulePair, ...]
    left: dict[str, str]
    dtype: str
    target: str = "peft"

    @property
    def heads(self) -> list[str]:
        """Heads that change apart from the embedding, which the base may tie them to."""
        return [module.name for module in self.modules if module.pairs[0].key.role == "lm_head"]


@dataclass(frozen=True, slots=True)
class Spending:
    """What a budget bought: matrix → label → rank, and label → what is said of it."""

    ranks: dict[str, dict[str, float]]
    report: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A tensor of the tuned model that gets no factors; ``energy`` is ‖Δ‖² of it, None where it has no delta.

    ``whole`` is the tuned tensor, where an adapter may store it as it is.
    """

    name: str
    role: str
    reason: str
    energy: float | None
    whole: TensorSpec | None = None


@dataclass(slots=True)
class Rest:
    """All that is outside the factors, and the changes of the biases that may go beside them."""

    leftovers: list[Leftover] = field(default_factory=list)
    biases: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)  # tensor → its change, when read
    unchanged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Assembly:
    """All that the adapters are made from."""

    sources: Sources
    options: ExtractOptions
    rows: Mapping[str, dict[str, Any]]
    pieces: Pieces
    rest: Rest
    spending: Spending | None
    identity: dict[str, Any]
    loader: dict[str, Any] | None = None  # what says which class loads it, where the base's config cannot

    @cached_property
    def changed(self) -> list[ModulePair]:
        """Modules whose ΔW is not zero."""
        return [m for m in self.sources.modules if any(self.rows[str(p.key)]["energy"] for p in m.pairs)]
