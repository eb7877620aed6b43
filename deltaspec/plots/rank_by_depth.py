"""Effective rank and rank_90 by depth, a line per role."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deltaspec.architecture.roles import order_roles
from deltaspec.plots.style import (
    Looks,
    find_venue,
    label_rank,
    legend_below,
    new_figure,
    role_handles,
    role_styles,
    rounding_handle,
    use_venue,
)
from deltaspec.plots.tables import RANKS, Columns, Row, has_rounding, order_stacks, to_columns, to_rows

# More layers than this need the whole width, so the two panels lie on top of each other.
CROWDED = 12


def select_depths(cells: Columns) -> Columns:
    """Keep the cells that lie in blocks; no columns where there are none."""
    return to_columns([row for row in to_rows(cells) if row["depth"] is not None])


def draw_rank_by_depth(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw effective rank and rank_90 against depth: the median, with a band from smallest to largest expert.

    Parameters
    ----------
    columns : Columns
        From ``select_depths``, at least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        Two panels, or two for each stack. Points that count directions of storage rounding are hollow.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = to_rows(columns)
    stacks, styles = order_stacks(columns["stack"]), role_styles(columns["role"])
    with use_venue(style):
        crowded = find_venue(style).narrow or len(set(columns["depth"])) > CROWDED
        stacked = crowded and len(stacks) == 1
        shape = (2, 1) if stacked else (len(stacks), 2)
        figure = new_figure(style, em=5 + 12 * shape[0])
        axes = figure.subplots(*shape, squeeze=False, sharex="col" if stacked else False).reshape(-1, 2)
        for stack, pair in zip(stacks, axes, strict=True):
            members = [row for row in rows if row["stack"] == stack]
            for name, ax in zip(RANKS, pair, strict=True):
                _draw_lines(ax, members, styles, name=name)
                ax.set_ylabel(label_rank(name, rows[0]["spectrum_of"], join="\n"), linespacing=1.1)
            pair[0].set_title(stack)
        figure.align_ylabels()
        for ax in axes[-1, stacked:]:
            ax.set_xlabel("layer")
        handles = role_handles(columns["role"])
        legend_below(
            figure, handles + [rounding_handle()] * any(has_rounding(row, name) for row in rows for name in RANKS)
        )
    return figure


def _draw_lines(ax: Axes, rows: Sequence[Row], styles: Looks, *, name: str) -> None:
    for role in order_roles(row["role"] for row in rows):
        line = [row for row in rows if row["role"] == role]
        depths = [row["depth"] for row in line]
        colour, marker = styles[role]
        low, high = ([row[f"{name}_{end}"] for row in line] for end in ("min", "max"))
        ax.fill_between(depths, low, high, color=colour, alpha=0.1, linewidth=0)
        ax.plot(
            depths,
            [row[name] for row in line],
            color=colour,
            marker=marker,
            label=role,
            zorder=3,
            clip_on=False,
            in_layout=False,
        )
        hollow = [row for row in line if has_rounding(row, name)]
        ax.plot(
            [row["depth"] for row in hollow],
            [row[name] for row in hollow],
            color=colour,
            marker=marker,
            markerfacecolor="white",
            linestyle="none",
            zorder=3,
            clip_on=False,
            in_layout=False,
        )
    ax.set_ylim(0, 1.06 * max([1.0, *(row[f"{name}_max"] for row in rows if math.isfinite(row[f"{name}_max"]))]))
    ax.margins(x=0.03)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
