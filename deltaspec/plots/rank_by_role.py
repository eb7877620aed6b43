"""Effective rank and rank_90 of every layer, a row per role."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deltaspec.plots.style import (
    NULL_COLOUR,
    find_venue,
    label_rank,
    label_role,
    legend_below,
    median_handle,
    new_figure,
    null_handle,
    role_styles,
    rounding_handle,
    use_venue,
)
from deltaspec.plots.tables import RANKS, Columns, Row, has_rounding, median, to_rows

# A row's layers run from the first, at the top, to the last, over this share of the row's height.
SPREAD = 0.56
# Noise that would leave the data less than a third of the axis stays outside it.
FAR = 3.0


def draw_rank_by_role(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw every layer's effective rank and rank_90, with the role's median and what noise of its shape scores.

    Parameters
    ----------
    columns : Columns
        From ``tabulate_cells``, at least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        Two panels that share their rows: one row per (stack, role), the first layer uppermost within it.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = to_rows(columns)
    groups = list(dict.fromkeys((row["stack"], row["role"]) for row in rows))
    narrow, styles = find_venue(style).narrow, role_styles(columns["role"])
    with use_venue(style):
        figure = new_figure(style, em=7.5 + 1.75 * max(len(groups), 2))
        axes = figure.subplots(1, 2, sharey=True)
        for name, ax in zip(RANKS, axes, strict=True):
            for place, group in enumerate(groups):
                members = [row for row in rows if (row["stack"], row["role"]) == group]
                _draw_role(ax, members, styles[group[1]], place=place, name=name)
            ax.set_xlabel(label_rank(name, rows[0]["spectrum_of"], join="\n" if narrow else " "), linespacing=1.1)
            ax.set_xlim(0, _choose_limit(rows, name=name))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5 if narrow else 7, min_n_ticks=1))
        axes[0].set_yticks(range(len(groups)), [f"{stack} {label_role(role)}".lstrip() for stack, role in groups])
        axes[0].set_ylim(len(groups) - 0.5, -0.5)
        axes[1].tick_params(left=False)
        handles = [median_handle(), null_handle()]
        hollow = any(has_rounding(row, name) for row in rows for name in RANKS)
        legend_below(figure, [*handles, rounding_handle()] if hollow else handles)
    return figure


def _draw_role(ax: Axes, rows: Sequence[Row], look: tuple[str, str], *, place: int, name: str) -> None:
    colour, marker = look
    count = len(rows)
    heights = [place + SPREAD * ((number + 0.5) / count - 0.5) for number in range(count)]
    for hollow in (False, True):
        points = [(row[name], y) for row, y in zip(rows, heights, strict=True) if has_rounding(row, name) is hollow]
        ax.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            marker=marker,
            markerfacecolor="white" if hollow else colour,
            linestyle="none",
            clip_on=False,
            zorder=3,
            in_layout=False,
        )
    middle, null = median(row[name] for row in rows), median(row[f"{name}_null"] for row in rows)
    if count > 1:
        ax.vlines(middle, place - 0.38, place + 0.38, color="black", zorder=4)
    ax.vlines(null, place - 0.42, place + 0.42, color=NULL_COLOUR, zorder=1)


def _choose_limit(rows: Sequence[Row], *, name: str) -> float:
    largest = max([1.0, *(row[name] for row in rows if math.isfinite(row[name]))])
    nulls = [row[f"{name}_null"] for row in rows]
    limit: float = max([largest, *(null for null in nulls if null <= FAR * largest)])
    return 1.05 * limit
