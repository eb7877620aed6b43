"""What a merge says about itself: how much of each update rounding lost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

from deltaspec.architecture.roles import group_rare, order_roles
from deltaspec.merging.apply import Loss
from deltaspec.store.formats.adapter import MergedReport, MergedSums, MergeIdentity, MergeLoss
from deltaspec.types import MatrixKey, Shape

MUCH = 0.05  # a total loss above which serving the adapter unmerged is worth its cost


class RoleLoss(TypedDict):
    """What rounding lost in the matrices of one role, as shares."""

    role: str
    matrices: int
    median_loss: float | None
    worst_loss: float | None
    unchanged: float


@dataclass(frozen=True, slots=True)
class MergedMatrix:
    """One changed matrix or vector: its shape, the dtype that it is stored in, and what rounding lost."""

    key: MatrixKey
    shape: Shape
    dtype: str
    loss: Loss

    def to_dict(self) -> MergedSums:
        """Return it as plain data."""
        return {**asdict(self.key), "shape": list(self.shape), "dtype": self.dtype, **asdict(self.loss)}  # type: ignore[typeddict-item]

    @classmethod
    def from_dict(cls, row: MergedSums) -> MergedMatrix:
        """Take it from plain data; KeyError where a field is missing."""
        place = (row["tensor"], row["part"], row["role"], row["depth"], row["expert"], row["stack"])
        loss = Loss(row["update"], row["error"], row["unchanged"], row["elements"])
        return cls(MatrixKey(*place), tuple(row["shape"]), row["dtype"], loss)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A finished merge.

    Attributes
    ----------
    path : Path
        The merged checkpoint.
    facts : MergeIdentity
    rows : tuple of MergedMatrix
    notes : tuple of str
    """

    path: Path
    facts: MergeIdentity
    rows: tuple[MergedMatrix, ...]
    notes: tuple[str, ...]

    @property
    def loss(self) -> Loss:
        """The losses of all matrices, added up."""
        return sum((row.loss for row in self.rows), start=Loss())

    def by_role(self) -> list[RoleLoss]:
        """One row for each role: matrices, median and worst relative loss, median share of unchanged elements."""
        groups: defaultdict[str, list[Loss]] = defaultdict(list)
        shown = group_rare(Counter(row.key.role for row in self.rows))
        for row in self.rows:
            groups[shown[row.key.role]].append(row.loss)
        return [_summary(role, groups[role]) for role in order_roles(groups)]

    def remark(self) -> str:
        """Say what to do where rounding lost much; "" where it did not."""
        lost = self.loss.relative or 0.0
        if lost <= MUCH:
            return ""
        kinds = ", ".join(sorted({row.dtype for row in self.rows}))
        return (
            f"Rounding to {kinds} lost {lost:.1%} of the update: serve the adapter unmerged, or merge with --dtype "
            "fp32, to keep it."
        )

    def to_dict(self) -> MergedReport:
        """Everything as plain data: what ``deltaspec.json`` of a merged checkpoint holds."""
        return {
            **self.facts,
            "total": _shares(self.loss),
            "remark": self.remark(),
            "notes": list(self.notes),
            "matrices": [{**row.to_dict(), **_shares(row.loss)} for row in self.rows],
        }


def _shares(loss: Loss) -> MergeLoss:
    return {"relative_loss": loss.relative, "unchanged_fraction": loss.unchanged_share}


def _summary(role: str, losses: Sequence[Loss]) -> RoleLoss:
    lost = [loss.relative for loss in losses if loss.relative is not None]
    return {
        "role": role,
        "matrices": len(losses),
        "median_loss": median(lost) if lost else None,
        "worst_loss": max(lost, default=None),
        "unchanged": median(loss.unchanged_share for loss in losses),
    }
