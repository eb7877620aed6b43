"""Effective rank as a share of noise's, layer × role."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from deltaspec.architecture.roles import order_roles
from deltaspec.plots.style import label_role, legend_below, new_figure, use_venue
from deltaspec.plots.tables import Columns, Row, has_rounding, order_stacks, to_columns, to_rows

HATCH = "////"
NAMES = ("stack", "role", "depth", "matrices", "effective_rank_with_rounding", "spectrum_of", "effective_rank_ratio")


def select_ratios(cells: Columns) -> Columns:
    """Keep the cells in blocks that have an ``effective_rank_ratio``; no columns where there are none."""
    rows = [{name: row[name] for name in NAMES} for row in to_rows(cells) if row["depth"] is not None]
    return to_columns([row for row in rows if math.isfinite(row["effective_rank_ratio"])])


def draw_heatmap(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw effective_rank_ratio, a row per role and a column per layer; what is missing stays blank.

    Parameters
    ----------
    columns : Columns
        From ``select_ratios``, at least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        One panel per stack, all on one colour scale. Cells that count directions of storage rounding are hatched.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = to_rows(columns)
    stacks = order_stacks(columns["stack"])
    counts = [len({row["role"] for row in rows if row["stack"] == stack}) for stack in stacks]
    low, high = min(columns["effective_rank_ratio"]), max(columns["effective_rank_ratio"])
    limits = (low, high) if high > low else (low - 0.05, high + 0.05)
    with use_venue(style):
        figure = new_figure(style, em=9 + 1.5 * sum(counts) + 2.5 * (len(stacks) - 1))
        axes = figure.subplots(len(stacks), 1, squeeze=False, height_ratios=counts)[:, 0]
        for stack, ax in zip(stacks, axes, strict=True):
            mesh = _draw_cells(ax, [row for row in rows if row["stack"] == stack], limits=limits)
            ax.set_title(stack)
        axes[-1].set_xlabel("layer")
        bar = figure.colorbar(mesh, ax=list(axes), ticks=MaxNLocator(5), pad=0.02, aspect=12 + 1.6 * sum(counts))
        bar.set_label("effective rank\n÷ that of noise", linespacing=0.9)
        if any(has_rounding(row, "effective_rank") for row in rows):
            legend_below(figure, [_hatch_handle()])
    return figure


def _hatch_handle() -> Patch:
    return Patch(facecolor="#DDDDDD", edgecolor="black", hatch=HATCH, linewidth=0, label="counts rounding")


def _draw_cells(ax: Axes, rows: Sequence[Row], *, limits: tuple[float, float]) -> QuadMesh:
    roles = order_roles(row["role"] for row in rows)
    first, last = min(row["depth"] for row in rows), max(row["depth"] for row in rows)
    ratios = np.full((len(roles), last - first + 1), np.nan)
    for row in rows:
        place = roles.index(row["role"]), row["depth"] - first
        ratios[place] = row["effective_rank_ratio"]
        if has_rounding(row, "effective_rank"):
            corner = (row["depth"] - 0.5, place[0] - 0.5)
            light = 2 * row["effective_rank_ratio"] > sum(limits)
            colour = "black" if light else "white"
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch=HATCH, edgecolor=colour, linewidth=0, zorder=3))
    edges = np.arange(first, last + 2) - 0.5
    mesh = ax.pcolormesh(
        edges, np.arange(len(roles) + 1) - 0.5, ratios, vmin=limits[0], vmax=limits[1], rasterized=False
    )
    ax.set_ylim(len(roles) - 0.5, -0.5)
    ax.set_yticks(range(len(roles)), [label_role(role) for role in roles])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return mesh
