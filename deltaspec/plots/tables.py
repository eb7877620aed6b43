"""What figures draw: records in, columns out. A figure's CSV holds exactly these columns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaspec.architecture.roles import order_roles
from deltaspec.spectra.resolution import counts_rounding
from deltaspec.types import MatrixRecord

Columns = dict[str, list[Any]]
Row = dict[str, Any]
Floats = NDArray[np.float64]
Values = Callable[[MatrixRecord], Floats]

MAX_POINTS = 200
RANKS = ("effective_rank", "rank_90")
CENTRE = ("effective_rank_null", "rank_90_null", "effective_rank_ratio")


def to_columns(rows: Sequence[Row]) -> Columns:
    """Turn rows that all have the same names into columns."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def to_rows(columns: Columns) -> list[Row]:
    """Turn columns into rows."""
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def choose_drawn(records: Iterable[MatrixRecord]) -> list[MatrixRecord]:
    """Return the records of the update; where a run has none, those of tuned, else of base."""
    by_kind: dict[str, list[MatrixRecord]] = defaultdict(list)
    for record in records:
        by_kind[record.spectrum_of].append(record)
    return next((by_kind[kind] for kind in ("delta", "tuned", "base") if kind in by_kind), [])


def order_stacks(stacks: Iterable[str]) -> list[str]:
    """Return each stack once, as its name first appears; what lies in none comes last."""
    return sorted(dict.fromkeys(stacks), key=lambda stack: not stack)


def metric(record: MatrixRecord, name: str) -> float:
    """Return a metric as a float; NaN where it is absent or does not apply."""
    value = record.metrics.get(name)
    return math.nan if value is None else float(value)


def median(values: Iterable[float]) -> float:
    """Return the median of the finite values; NaN where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else math.nan


def tabulate_cells(records: Iterable[MatrixRecord]) -> Columns:
    """One row per (stack, role, depth): the median over its experts or kernels, with the smallest and largest.

    Parameters
    ----------
    records : iterable of MatrixRecord
        Of the update where there are any; otherwise of tuned, else of base.

    Returns
    -------
    Columns
        stack, role, depth (None outside the blocks), matrices and unresolved (counts), spectrum_of, then the metrics
        by their names, ranks also with _min, _max and _with_rounding (how many count rounding); NaN where a metric
        does not apply.
    """
    cells: dict[tuple[str, str, int | None], list[MatrixRecord]] = defaultdict(list)
    for record in choose_drawn(records):
        cells[record.key.stack, record.key.role, record.key.depth].append(record)
    order = order_roles(role for _, role, _ in cells)
    stacks = order_stacks(stack for stack, _, _ in cells)

    def place(cell: tuple[str, str, int | None]) -> tuple[int, int, int]:
        return stacks.index(cell[0]), order.index(cell[1]), -1 if cell[2] is None else cell[2]

    return to_columns([summarise(_name(cell), cells[cell]) for cell in sorted(cells, key=place)])


def _name(cell: tuple[str, str, int | None]) -> Row:
    return dict(zip(("stack", "role", "depth"), cell, strict=True))


def summarise(start: Row, records: Sequence[MatrixRecord]) -> Row:
    """Return a row that begins with ``start`` and says what one cell's matrices score; see ``tabulate_cells``."""
    row = dict(start)
    row["matrices"] = len(records)
    row["unresolved"] = sum(record.metrics.get("resolved") is False for record in records)
    row["spectrum_of"] = records[0].spectrum_of
    for name in RANKS:
        values = [value for record in records if math.isfinite(value := metric(record, name))]
        row[name] = median(values)
        row[f"{name}_min"] = min(values, default=math.nan)
        row[f"{name}_max"] = max(values, default=math.nan)
        row[f"{name}_with_rounding"] = sum(counts_rounding(record.metrics, name) for record in records)
    for name in CENTRE:
        row[name] = median(metric(record, name) for record in records)
    return {name: _round_rank(name, value) for name, value in row.items()}


def _round_rank(name: str, value: Any) -> Any:
    return int(value) if name.startswith("rank_90") and float(value).is_integer() else value


def has_rounding(row: Row, name: str) -> bool:
    """Whether the rank ``name`` counts directions of storage rounding in most of a cell's matrices."""
    return bool(2 * row[f"{name}_with_rounding"] > row["matrices"])


def thin_ranks(count: int) -> NDArray[np.int64]:
    """Return at most ``MAX_POINTS`` ranks from 1 to ``count``, evenly spaced on a log axis, both ends included."""
    spaced = np.geomspace(1, max(count, 1), MAX_POINTS)
    return np.unique(np.rint(spaced).astype(np.int64))[: max(count, 0)]


def tabulate_energy(records: Iterable[MatrixRecord], values: Values) -> Columns:
    """Share of ‖ΔW‖² that the top singular values hold, by (stack, role) and rank.

    Parameters
    ----------
    records : iterable of MatrixRecord
        Those in blocks; where a run has none in blocks, all of them.
    values : callable
        From a record to its singular values, (k,) float64, descending.

    Returns
    -------
    Columns
        stack, role, rank, matrices, spectrum_of, energy_kept (the median over matrices, in 0…1), energy_kept_q25 and
        energy_kept_q75. Zero matrices are left out: they have no energy to share.
    """
    chosen = choose_drawn(records)
    chosen = [record for record in chosen if record.key.depth is not None] or chosen
    groups: dict[tuple[str, str], list[MatrixRecord]] = defaultdict(list)
    for record in chosen:
        groups[record.key.stack, record.key.role].append(record)
    order = order_roles(role for _, role in groups)
    stacks = order_stacks(stack for stack, _ in groups)
    rows: list[Row] = []
    for stack, role in sorted(groups, key=lambda group: (stacks.index(group[0]), order.index(group[1]))):
        members = groups[stack, role]
        ranks = thin_ranks(max(min(record.shape) for record in members))
        kept = [share for record in members if (share := _share_kept(values(record), ranks)) is not None]
        if kept:
            start = {"stack": stack, "role": role, "matrices": len(kept), "spectrum_of": members[0].spectrum_of}
            rows += _quartile_rows(start, ranks=ranks, kept=np.stack(kept))
    return to_columns(rows)


def _share_kept(singular_values: Floats, ranks: NDArray[np.int64]) -> Floats | None:
    energy = np.cumsum(np.square(singular_values))
    if not energy.size or energy[-1] <= 0:
        return None
    share: Floats = (energy / energy[-1])[np.minimum(ranks, energy.size) - 1]
    return share


def _quartile_rows(start: Row, *, ranks: NDArray[np.int64], kept: Floats) -> list[Row]:
    low, middle, high = np.quantile(kept, (0.25, 0.5, 0.75), axis=0)
    names = ("rank", "energy_kept", "energy_kept_q25", "energy_kept_q75")
    columns = zip(ranks.tolist(), middle.tolist(), low.tolist(), high.tolist(), strict=True)
    return [start | dict(zip(names, row, strict=True)) for row in columns]
