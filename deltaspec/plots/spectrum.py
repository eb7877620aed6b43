"""Singular values on log axes, with the rounding edge and the noise null."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from deltaspec.architecture.roles import order_roles
from deltaspec.plots.style import (
    GREY,
    NULL_COLOUR,
    SYMBOLS,
    find_venue,
    label_role,
    legend_below,
    new_figure,
    role_styles,
    use_venue,
)
from deltaspec.plots.tables import Columns, Floats, Row, Values, choose_drawn, metric, thin_ranks, to_columns, to_rows
from deltaspec.types import MatrixRecord

MAX_PANELS = 8
NULL_DASHES = (0, (4, 2))
EDGE_DASHES = (0, (1, 1.2))


def choose_matrices(records: Iterable[MatrixRecord]) -> list[MatrixRecord]:
    """Choose one matrix per role, at its middle depth: of the stack with most depths, of the lowest expert.

    Of more than ``MAX_PANELS`` roles those stay that changed and have the most matrices, then the longest spectra.
    """
    groups: dict[str, list[MatrixRecord]] = defaultdict(list)
    for record in choose_drawn(records):
        groups[record.key.role].append(record)
    middle = {role: _choose_middle(groups[role]) for role in order_roles(groups)}

    def weigh(role: str) -> tuple[bool, int, int]:
        changed = metric(middle[role], "frobenius_norm") != 0
        return changed, len(groups[role]), min(middle[role].shape)

    kept = sorted(middle, key=weigh, reverse=True)[:MAX_PANELS]
    return [middle[role] for role in order_roles(kept)]


def _choose_middle(records: Sequence[MatrixRecord]) -> MatrixRecord:
    stacks: dict[str, dict[int, MatrixRecord]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: record.key.expert or 0):
        stacks[record.key.stack].setdefault(-1 if record.key.depth is None else record.key.depth, record)
    deepest = max(stacks.values(), key=len)
    return deepest[sorted(deepest)[len(deepest) // 2]]


def tabulate_spectra(records: Iterable[MatrixRecord], values: Values) -> Columns:
    """Singular values of chosen matrices, with what noise of the same shape and ``noise_sigma`` would have.

    Parameters
    ----------
    records : iterable of MatrixRecord
        Each becomes a panel; see ``choose_matrices``.
    values : callable
        From a record to its singular values, (k,) float64, descending.

    Returns
    -------
    Columns
        tensor, part, stack, role, depth, expert, spectrum_of, index, singular_value, noise_singular_value,
        rounding_edge. At most ``MAX_POINTS`` indices of each matrix; values that are not above error_bound are NaN,
        so are noise and edge where they do not apply.
    """
    return to_columns([row for record in records for row in _list_values(record, values(record))])


def _list_values(record: MatrixRecord, values: Floats) -> list[Row]:
    count = len(values)
    sigma, edge = metric(record, "noise_sigma"), metric(record, "rounding_edge")
    noise = _noise(record.shape)[:count] * sigma if sigma > 0 else np.full(count, math.nan)
    shown = np.where(values > record.error_bound, values, math.nan)
    names = ("tensor", "part", "stack", "role", "depth", "expert")
    start: Row = {name: getattr(record.key, name) for name in names}
    return [
        {
            **start,
            "spectrum_of": record.spectrum_of,
            "index": index,
            "singular_value": float(shown[index - 1]),
            "noise_singular_value": float(noise[index - 1]),
            "rounding_edge": edge if edge > 0 else math.nan,
        }
        for index in thin_ranks(count).tolist()
    ]


def _noise(shape: tuple[int, int]) -> Floats:
    from deltaspec.spectra.nulls import null_singular_values

    return np.asarray(null_singular_values(*shape), dtype=np.float64)


def draw_spectrum(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw each matrix's singular values in its own panel, all panels on the same log axes.

    Parameters
    ----------
    columns : Columns
        From ``tabulate_spectra``, at least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        A panel per matrix: values solid, rounding edge dotted, noise of the same shape and median dashed.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in to_rows(columns):
        groups[row["tensor"], row["part"], str(row["expert"])].append(row)
    colours = role_styles(columns["role"])
    with use_venue(style):
        across = _choose_across(len(groups), narrow=find_venue(style).narrow)
        down = math.ceil(len(groups) / across)
        figure = new_figure(style, em=(5 + 9.5 * down) if across > 1 else 18)
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
        for ax, rows in zip(axes, groups.values(), strict=False):
            _draw_matrix(ax, rows, colours[rows[0]["role"]][0])
        for ax in axes[len(groups) :]:
            ax.remove()
        for ax in axes[max(len(groups) - across, 0) : len(groups)]:
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("index")
        _label(figure, list(axes[: len(groups)]), columns)
    return figure


def _choose_across(count: int, *, narrow: bool) -> int:
    if narrow:
        return min(count, 2)
    return min(count, 4) if count < 4 or -count % 4 <= -count % 3 else 3


def _draw_matrix(ax: Axes, rows: Sequence[Row], colour: str) -> None:
    first = rows[0]
    index = [row["index"] for row in rows]
    ax.plot(index, [row["noise_singular_value"] for row in rows], color=NULL_COLOUR, linestyle=NULL_DASHES)
    if math.isfinite(first["rounding_edge"]):
        ax.axhline(first["rounding_edge"], color="black", linestyle=EDGE_DASHES)
    values = [row["singular_value"] for row in rows]
    if any(map(math.isfinite, values)):
        ax.plot(index, values, color=colour)
    else:
        ax.text(0.5, 0.5, "zero", transform=ax.transAxes, ha="center", va="center")
    place = " ".join(str(part) for part in (first["stack"], first["depth"]) if part not in ("", None))
    where = f", {'' if first['stack'] else 'layer '}{place}" if place else ""
    ax.set_title(label_role(first["role"]) + where)


def _label(figure: Figure, axes: Sequence[Axes], columns: Columns) -> None:
    names = ("singular_value", "rounding_edge", "noise_singular_value")
    values, edges, noise = (np.array([value for value in columns[name] if math.isfinite(value)]) for name in names)
    # Noise falls to nothing at the last index of a square matrix, which must not set the scale.
    drawn = np.concatenate([values, edges]) if values.size + edges.size else np.array([0.1, 1.0])
    low, high = max(drawn.min(), 1e-8 * drawn.max()), drawn.max()
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlim=(0.85, 1.3 * max(columns["index"])), ylim=(low / 1.6, high * 1.6))
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    figure.supylabel(f"singular value of ${SYMBOLS[columns['spectrum_of'][0]]}$", fontsize="medium")
    handles = [Line2D([], [], color=GREY, label="singular values")]
    if edges.size:
        handles.append(Line2D([], [], color="black", linestyle=EDGE_DASHES, label="largest that rounding explains"))
    if noise.size:
        handles.append(
            Line2D([], [], color=NULL_COLOUR, linestyle=NULL_DASHES, label="noise of the same shape and median")
        )
    legend_below(figure, handles)
