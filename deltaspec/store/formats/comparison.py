"""Rows of ``compare.json``."""

from __future__ import annotations

from typing import TypedDict


class TrainingCosts(TypedDict):
    """What one training cost, learned and forgot: the first columns of a comparison."""

    label: str
    method: str
    folder: str
    lr: float
    seed: int
    steps: int
    trainable: int
    head: int
    stored: int
    metric: str
    learned: float | None
    learned_before: float | None
    kept_metric: str | None
    kept: float | None
    kept_before: float | None
    forgotten: float | None
    seconds_per_step: float
    peak_memory: int


class ChangeSummary(TypedDict):
    """What a training's ΔW is like: medians and means over matrices, None where there is no ΔW to measure."""

    changed: int | None
    relative_norm: float | None
    effective_rank: float | None
    rank_90: float | None
    overlap: float | None
    overlap_null: float | None
    overlap_with: str | None
    amplification: float | None
    amplification_null: float | None
    intruders: float | None
    intruders_null: float | None
    intruder_energy: float | None


class ComparisonRow(TrainingCosts, ChangeSummary):
    """One training in ``compare.json``."""
