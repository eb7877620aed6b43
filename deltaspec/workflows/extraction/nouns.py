"""What an extraction is made of: its sources, what a budget bought, what is left over, and the assembly of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from deltaspec.io.moments import Moments
from deltaspec.options import ExtractOptions
from deltaspec.pairing.plan import Plan
from deltaspec.store.formats.adapter import BudgetReport, ExtractionIdentity
from deltaspec.store.formats.piece import FactorisedRow
from deltaspec.store.pieces import Pieces
from deltaspec.types import Checkpoint, ModulePair, NoteKind, Opened, TensorSpec

Finished = Mapping[str, FactorisedRow]
"""Finished matrices by their key."""


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
    extras: str = "none"

    @property
    def heads(self) -> list[str]:
        """Heads that change apart from the embedding, which the base may tie them to."""
        return [module.name for module in self.modules if module.pairs[0].key.role == "lm_head"]


@dataclass(frozen=True, slots=True)
class Extraction:
    """What is to be made, and from what.

    Attributes
    ----------
    sources : Sources
    options : ExtractOptions
    identity : ExtractionIdentity
        What the adapters are made from, for their reports.
    moments : Moments, optional
        Second moments of the layers' inputs.
    loader : dict, optional
        What says which class loads the adapters, where the base's config cannot.
    """

    sources: Sources
    options: ExtractOptions
    identity: ExtractionIdentity
    moments: Moments | None = None
    loader: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Spending:
    """What a budget bought: matrix → label → rank, and label → what is said of it."""

    ranks: dict[str, dict[str, int]]
    report: dict[str, BudgetReport]


@dataclass(frozen=True, slots=True)
class Leftover:
    """A tensor of the tuned model that gets no factors; ``energy`` is ‖Δ‖² of it, None where it has no delta.

    ``reason`` tells a reader why, ``kind`` the code. ``whole`` is the tuned tensor, where an adapter may store it as it
    is.
    """

    name: str
    role: str
    reason: str
    energy: float | None
    whole: TensorSpec | None = None
    kind: NoteKind = NoteKind.REMARK


@dataclass(slots=True)
class Rest:
    """All that is outside the factors, and the changes of the biases that may go beside them."""

    leftovers: list[Leftover] = field(default_factory=list)
    biases: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # tensor → its change, when read
    unchanged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Assembly:
    """All that the adapters are made from, once every matrix is factorised."""

    extraction: Extraction
    rows: Finished
    pieces: Pieces
    rest: Rest
    spending: Spending | None

    @property
    def sources(self) -> Sources:
        """Both sides, and the modules that get factors."""
        return self.extraction.sources

    @property
    def options(self) -> ExtractOptions:
        """Ranks, form and the rest of what was asked for."""
        return self.extraction.options

    @cached_property
    def changed(self) -> list[ModulePair]:
        """Modules whose ΔW is not zero."""
        return [m for m in self.sources.modules if any(self.rows[str(p.key)]["energy"] for p in m.pairs)]
