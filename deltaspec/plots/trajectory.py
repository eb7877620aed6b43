"""Rank against training step, a line per role."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from deltaspec.architecture.roles import order_roles
from deltaspec.plots.figures import Draw
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
from deltaspec.plots.tables import (
    RANKS,
    Columns,
    Row,
    choose_drawn,
    has_rounding,
    median,
    metric,
    order_stacks,
    summarise,
    to_columns,
    to_rows,
)
from deltaspec.types import MatrixRecord

SHARES = tuple(f"{name}_ratio" for name in RANKS)
Steps = Sequence[tuple[int, Sequence[MatrixRecord]]]


def tabulate_steps(steps: Steps) -> Columns:
    """One row per (stack, role, step): the median over the role's matrices, with the smallest and largest.

    Parameters
    ----------
    steps : sequence of (int, sequence of MatrixRecord)
        Training steps, ascending, each with its records. Matrices outside the blocks are left out where there are
        any in blocks.

    Returns
    -------
    Columns
        stack, role, step, then as of ``tabulate_cells``, and the medians of relative_norm and of both ranks' share of
        what noise scores (effective_rank_ratio, rank_90_ratio).
    """
    drawn = [(step, choose_drawn(records)) for step, records in steps]
    inside = any(record.key.depth is not None for _, records in drawn for record in records)
    groups: dict[tuple[str, str, int], list[MatrixRecord]] = defaultdict(list)
    for step, records in drawn:
        for record in records:
            if record.key.depth is not None or not inside:
                groups[record.key.stack, record.key.role, step].append(record)
    order = order_roles(role for _, role, _ in groups)
    stacks = order_stacks(stack for stack, *_ in groups)
    rows: list[Row] = []
    for stack, role, step in sorted(groups, key=lambda g: (stacks.index(g[0]), order.index(g[1]), g[2])):
        members = groups[stack, role, step]
        row = summarise({"stack": stack, "role": role, "step": step}, members)
        rows.append(row | {name: median(metric(r, name) for r in members) for name in ("relative_norm", *SHARES)})
    return to_columns(rows)


def draw_rank_by_step(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw effective rank and rank_90 against training step: medians over a role's matrices.

    Parameters
    ----------
    columns : Columns
        From ``tabulate_steps``, at least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        Two panels, or two for each stack. The axis of steps is logarithmic where they are spaced so. Points that
        mostly count directions of storage rounding are hollow.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    return _draw(columns, RANKS, style=style)


def draw_share_by_step(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw both ranks as a share of what noise of the same shape scores, against training step.

    Parameters
    ----------
    columns, style
        As of ``draw_rank_by_step``.

    Returns
    -------
    Figure
        As of ``draw_rank_by_step``; at 100 % a change has as many directions as noise.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    return _draw(columns, SHARES, style=style)


class StepFigure(NamedTuple):
    """How one figure of a trajectory is made."""

    tabulate: Callable[[Steps], Columns]
    draw: Draw
    about: str


STEP_FIGURES: dict[str, StepFigure] = {
    "rank_by_step": StepFigure(
        tabulate_steps, draw_rank_by_step, "effective rank and rank_90 against training step, a line per role"
    ),
    "share_by_step": StepFigure(
        tabulate_steps, draw_share_by_step, "the same as a share of what noise of the shape scores"
    ),
}


def _draw(columns: Columns, names: Sequence[str], *, style: str) -> Figure:
    rows = to_rows(columns)
    stacks, styles = order_stacks(columns["stack"]), role_styles(columns["role"])
    with use_venue(style):
        stacked = find_venue(style).narrow and len(stacks) == 1
        shape = (2, 1) if stacked else (len(stacks), 2)
        figure = new_figure(style, em=5 + 12 * shape[0])
        axes = figure.subplots(*shape, squeeze=False, sharex="col" if stacked else False).reshape(-1, 2)
        for stack, pair in zip(stacks, axes, strict=True):
            members = [row for row in rows if row["stack"] == stack]
            for name, ax in zip(names, pair, strict=True):
                _draw_lines(ax, members, styles, name=name)
                _scale_steps(ax, sorted(set(columns["step"])))
                ax.set_ylabel(_label(name, rows[0]["spectrum_of"]), linespacing=1.1)
            pair[0].set_title(stack)
        figure.align_ylabels()
        for ax in axes[-1, stacked:]:
            ax.set_xlabel("training step")
        hollow = any(has_rounding(row, name) for row in rows for name in RANKS)
        handles = role_handles(columns["role"])
        legend_below(figure, handles + [rounding_handle()] * hollow)
    return figure


def _label(name: str, spectrum_of: str) -> str:
    rank = name.removesuffix("_ratio")
    return label_rank(rank, spectrum_of, join="\n") + ("" if rank == name else ",\nshare of noise")


def _draw_lines(ax: Axes, rows: Sequence[Row], styles: Looks, *, name: str) -> None:
    for role in order_roles(row["role"] for row in rows):
        line = [row for row in rows if row["role"] == role]
        colour, marker = styles[role]
        for hollow in (False, True):
            points = [row for row in line if not hollow or has_rounding(row, name.removesuffix("_ratio"))]
            ax.plot(
                [row["step"] for row in points],
                [row[name] for row in points],
                color=colour,
                marker=marker,
                markerfacecolor="white" if hollow else colour,
                linestyle="none" if hollow else "-",
                label="_hollow" if hollow else role,
                zorder=3,
                clip_on=False,
                in_layout=False,
            )
    share = name in SHARES
    finite = [row[name] for row in rows if math.isfinite(row[name])]
    ax.set_ylim(0, 1.06 * max([0.01 if share else 1.0, *finite]))
    ax.yaxis.set_major_locator(MaxNLocator(integer=not share, nbins=5))
    if share:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _scale_steps(ax: Axes, steps: Sequence[int]) -> None:
    """Choose a logarithmic axis where ratios of steps vary less than their differences, and mark real steps on it."""
    positive = np.array([step for step in steps if step > 0], dtype=np.float64)
    ax.margins(x=0.03)
    if len(positive) > 2 and _unevenness(np.log(positive)) < _unevenness(positive):
        if len(positive) == len(steps):
            ax.set_xscale("log", base=2)
        else:
            ax.set_xscale("symlog", base=2, linthresh=positive[0])
        marked = steps if len(steps) <= 8 else steps[:: math.ceil(len(steps) / 8)]
        ax.set_xticks(marked, minor=False)
        ax.set_xticks([], minor=True)
        ax.xaxis.set_major_formatter(ScalarFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _unevenness(places: np.ndarray) -> float:
    gaps = np.diff(places)
    return float(gaps.std() / gaps.mean())
