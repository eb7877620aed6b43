"""How far long work is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is; ``work`` is what time is estimated from, in multiply-adds."""

    done: int
    total: int
    failed: int
    work_done: int
    work_total: int
    weights_done: int
