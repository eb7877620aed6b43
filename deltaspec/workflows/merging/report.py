"""What a merge says about itself: how much of each update rounding lost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deltaspec.architecture.roles import ORDER
from deltaspec.merging.apply import Loss

MUCH = 0.05  # a total loss above which serving the adapter unmerged is worth its cost


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A finished merge.

    Attributes
    ----------
    path : Path
        The merged checkpoint.
    facts : dict
        What was merged: kind, base, adapters with weights, dtype, version.
    rows : list of dict
        One for each changed matrix or vector: the fields of its key, shape, dtype, and the sums of its Loss.
    notes : tuple of str
    """

    path: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def loss(self) -> Loss:
        """The losses of all matrices, added up."""
        return sum((loss_of(row) for row in self.rows), start=Loss())

    def by_role(self) -> list[dict[str, Any]]:
        """One row for each role: matrices, median and worst relative loss, median share of unchanged elements."""
        groups: defaultdict[str, list[Loss]] = defaultdict(list)
        for row in self.rows:
            groups[row["role"]].append(loss_of(row))
        return [_summary(role, groups[role]) for role in sorted(groups, key=ORDER.index)]

    def remark(self) -> str:
        """Say what to do where rounding lost much; "" where it did not."""
        lost = self.loss.relative or 0.0
        if lost <= MUCH:
            return ""
        kinds = ", ".join(sorted({row["dtype"] for row in self.rows}))
        return (
            f"Rounding to {kinds} lost {lost:.1%} of the update: serve the adapter unmerged, or merge with --dtype "
            "fp32, to keep it."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rows = [{**row, **_derived(loss_of(row))} for row in self.rows]
        return {
            **self.facts,
            "total": _derived(self.loss),
            "remark": self.remark(),
            "notes": list(self.notes),
            "matrices": rows,
        }


def loss_of(row: dict[str, Any]) -> Loss:
    """Return the sums that a row keeps."""
    return Loss(row["update"], row["error"], row["unchanged"], row["elements"])


def _derived(loss: Loss) -> dict[str, float | None]:
    return {"relative_loss": loss.relative, "unchanged_fraction": loss.unchanged_share}


def _summary(role: str, losses: list[Loss]) -> dict[str, Any]:
    lost = [loss.relative for loss in losses if loss.relative is not None]
    return {
        "role": role,
        "matrices": len(losses),
        "median_loss": median(lost) if lost else None,
        "worst_loss": max(lost, default=None),
        "unchanged": median(loss.unchanged_share for loss in losses),
    }
