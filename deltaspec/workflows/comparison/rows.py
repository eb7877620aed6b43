"""What a comparison says of a training: one row of compare.csv and compare.json."""

from __future__ import annotations

from typing import TypedDict


class TrainingCosts(TypedDict):
    """What one training cost, learned and forgot; None where it was not measured."""

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
    """What is known of its ΔW over the matrices that it changes; None where there is none, or nothing to compare with.

    ``changed`` is how many these are; ``overlap_with`` names the full fine-tuning that directions are compared with.
    """

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
    """Both."""


NOTHING = ChangeSummary(
    changed=None,
    relative_norm=None,
    effective_rank=None,
    rank_90=None,
    overlap=None,
    overlap_null=None,
    overlap_with=None,
    amplification=None,
    amplification_null=None,
    intruders=None,
    intruders_null=None,
    intruder_energy=None,
)
"""The row of a training without ΔW."""
