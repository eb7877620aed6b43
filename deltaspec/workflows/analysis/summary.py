"""A run → the rows of its tables: by role, by depth, by matrix."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from deltaspec.architecture.roles import order_roles
from deltaspec.pairing.names import natural_order
from deltaspec.spectra.resolution import counts_rounding
from deltaspec.store.run import Run
from deltaspec.store.trajectory import Trajectory
from deltaspec.types import MatrixRecord
from deltaspec.workflows.analysis.shown_roles import with_shown_roles

Row = dict[str, Any]
Group = tuple[Any, ...]  # what the rows of one group have in common
COLUMNS = (
    "relative_norm",
    "effective_rank",
    "effective_rank_ratio",
    "rank_90",
    "rank_90_ratio",
    "stable_rank",
    "rank_above_rounding",
    "rank_above_noise",
)


def by_role(records: list[MatrixRecord]) -> list[Row]:
    """One row for each spectrum, stack and role: number of matrices and the median of each of COLUMNS."""
    (shown,) = with_shown_roles([records])
    order = order_roles(record.key.role for record in shown)
    return _grouped(
        shown,
        lambda r: (r.spectrum_of, r.key.stack, r.key.role),
        lambda k: (k[0], k[1], order.index(k[2])),
        ("spectrum_of", "stack", "role"),
    )


def by_depth(records: list[MatrixRecord]) -> list[Row]:
    """One row for each spectrum, stack and block: number of matrices and the median of each of COLUMNS."""
    inside = [record for record in records if record.key.depth is not None]
    return _grouped(
        inside, lambda r: (r.spectrum_of, r.key.stack, r.key.depth), lambda k: k, ("spectrum_of", "stack", "depth")
    )


def by_matrix(records: list[MatrixRecord]) -> list[Row]:
    """One row for each record, with COLUMNS as they are."""
    rows = []
    for record in sorted(records, key=lambda r: natural_order(r.store_key)):
        row = {"matrix": record.store_key, "role": record.key.role, "shape": f"{record.shape[0]}×{record.shape[1]}"}
        rows.append({**row, **{name: record.metrics[name] for name in COLUMNS}, "rounding": _with_rounding([record])})
    return rows


VIEWS = {"role": by_role, "depth": by_depth, "matrix": by_matrix}


def by_step(trajectory: Trajectory, view: str = "role") -> list[Row]:
    """Return the rows of a run's table at each step, those of one role (depth, matrix) together.

    Parameters
    ----------
    trajectory : Trajectory
    view : str
        Of ``VIEWS``: role, depth or matrix.
    """
    names = ("spectrum_of", "stack", "role", "depth", "matrix")
    groups: defaultdict[Group, list[Row]] = defaultdict(list)
    for step, records in zip(trajectory.steps, with_shown_roles([run.records for run in trajectory.runs]), strict=True):
        for row in VIEWS[view](records):
            groups[tuple(row.get(name) for name in names)].append({"step": step, **row})
    return [row for group in groups.values() for row in group]


def _with_rounding(records: list[MatrixRecord]) -> set[str]:
    """Name the ranks that count directions of storage rounding in some of the matrices."""
    return {name for name in ("effective_rank", "rank_90") if any(counts_rounding(r.metrics, name) for r in records)}


def _grouped(
    records: list[MatrixRecord],
    key: Callable[[MatrixRecord], Group],
    order: Callable[[Group], Any],
    names: tuple[str, ...],
) -> list[Row]:
    groups: defaultdict[Group, list[MatrixRecord]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    rows = []
    for place in sorted(groups, key=order):
        group = groups[place]
        medians = {}
        for name in COLUMNS:
            values = [v for v in (record.metrics[name] for record in group) if v is not None]
            medians[name] = median(values) if values else None
        rows.append(
            {
                **dict(zip(names, place, strict=True)),
                "matrices": len(group),
                **medians,
                "rounding": _with_rounding(group),
            }
        )
    return rows


def describe_oddity(records: list[MatrixRecord]) -> str:
    """Say so where nothing changed, or where the change is as large as the weights; "" otherwise."""
    changes = [r.metrics["relative_norm"] for r in records if r.spectrum_of == "delta"]
    sizes = [float(change) for change in changes if change is not None]
    if sizes and max(sizes) == 0.0:
        return "Note: no matrix differs between the two models."
    if sizes and median(sizes) > 1:
        return "Note: the change is larger than the weights: is this model a fine-tune of that base?"
    return ""


def skipped_by_reason(run: Run) -> list[tuple[str, list[str]]]:
    """Reasons with the tensors they leave out, most first."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for row in run.skipped:
        groups[row["reason"]].append(row["tensor"])
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def vectors_by_role(run: Run) -> list[Row]:
    """Norms and biases: how many, how many unchanged, and the median relative change."""
    counts = Counter(row["role"] for row in run.vectors)
    rows = []
    for role, count in sorted(counts.items()):
        changes = [
            row["relative_norm"] for row in run.vectors if row["role"] == role and row["relative_norm"] is not None
        ]
        still = sum(row["unchanged_fraction"] == 1.0 for row in run.vectors if row["role"] == role)
        rows.append(
            {"role": role, "vectors": count, "unchanged": still, "relative_norm": median(changes) if changes else None}
        )
    return rows
