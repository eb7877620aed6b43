"""What trainings learned, forgot and changed: one point or bar for each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from deltaspec.plots.style import (
    BLACK,
    BLUE,
    BROWN,
    GREEN,
    GREY,
    GUIDE_COLOUR,
    NULL_COLOUR,
    ORANGE,
    PINK,
    PURPLE,
    SKY,
    VERMILLION,
    find_venue,
    legend_below,
    new_figure,
    use_venue,
)
from deltaspec.plots.tables import Columns, Row, to_rows

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, PINK, BROWN)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIZES = {"D": 0.75, "*": 1.8}  # areas that look alike
WIDE = 20  # times the smallest effective rank, from which on an axis is logarithmic


PANELS = (  # column, that of its null, title
    ("effective_rank", "", "effective rank"),
    ("overlap", "overlap_null", "overlap with\nfull fine-tuning"),
    ("intruders", "intruders_null", "intruder\ndimensions"),
)


def draw_learning(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw what each training forgot against what it learned; trainings of one label get a large point at their mean.

    Parameters
    ----------
    columns : Columns
        label, learned, kept (both better where higher: accuracy, or -perplexity), metric, kept_metric; at least one
        row. ``kept_before`` is the base's.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        One panel; a dotted line marks the base, at its mean where seeds differ in it.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = [row for row in to_rows(columns) if _known(row["learned"]) and _known(row["kept"])]
    labels = list(dict.fromkeys(columns["label"]))
    with use_venue(style):
        narrow = find_venue(style).narrow
        figure = new_figure(style, em=24 if narrow else 20)
        ax = figure.subplots()
        for label in dict.fromkeys(row["label"] for row in rows):
            members = [row for row in rows if row["label"] == label]
            _draw_points(ax, members, style=_look(labels.index(label)))
        handles = [
            _handle(wrap(label, _room(style, 0.85)), _look(labels.index(label)))
            for label in dict.fromkeys(row["label"] for row in rows)
        ]
        before = [row["kept_before"] for row in rows if _known(row["kept_before"])]
        if before:
            handles.append(Line2D([], [], color=GUIDE_COLOUR, linestyle=":", label="before training"))
            ax.axhline(_mean(before), color=GUIDE_COLOUR, linestyle=":", zorder=1)
        _label(ax, columns)
        ax.margins(0.06)
        _add_legend(figure, handles)
    return figure


def draw_change(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw for each label the median effective rank, the overlap with full fine-tuning, and intruder dimensions.

    Parameters
    ----------
    columns : Columns
        label, effective_rank, overlap, overlap_null, intruders, intruders_null (shares of the vectors looked at); NaN
        or None where a training has none. At least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        Three panels that share their rows, one for each label, at the mean over its trainings; grey ticks are what
        random directions score. A panel for which no training has a number is left out.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = [row for row in to_rows(columns) if _known(row["effective_rank"])]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    panels = [panel for panel in PANELS if any(_known(row[panel[0]]) for row in rows)]
    shown = [wrap(label, _room(style, 0.3)) for label in labels]
    lines = max(1 + label.count("\n") for label in shown)
    with use_venue(style):
        figure = new_figure(style, em=7 + (0.6 + 1.1 * lines) * max(len(labels), 2))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (name, null, title) in zip(axes, panels, strict=True):
            for place, label in enumerate(labels):
                members = [row for row in rows if row["label"] == label]
                _draw_bar(ax, members, place=place, name=name, null=null)
            ax.set_xlabel(title, linespacing=1.1)
            _scale(ax, [row[name] for row in rows if _known(row[name])], share=bool(null))
        axes[0].set_yticks(range(len(labels)), shown, linespacing=1.0)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        for ax in axes[1:]:
            ax.tick_params(left=False)
        handles = [_tick(BLACK, "mean")]
        if len(panels) > 1:
            handles.append(_tick(NULL_COLOUR, "random directions"))
        legend_below(figure, handles)
    return figure


def wrap(label: str, width: int) -> str:
    """Break a label between words, and after commas, into lines of about ``width`` characters."""
    lines = [""]
    for piece in re.findall(r"[^ ,]+[ ,]?|[ ,]", label):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _room(style: str, share: float) -> int:
    """Return about how many characters of the small font fit into a share of the figure's width."""
    venue = find_venue(style)
    return int(share * venue.width * 72 / (0.5 * (venue.font_size - 1)))


def _scale(ax: Axes, values: Sequence[float], *, share: bool) -> None:
    """Shares from 0 on; ranks from 0 on too, or on a logarithmic axis where they differ widely."""
    if not share and min(values) > 0 and max(values) >= WIDE * min(values):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=4))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    ax.set_xlim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(FuncFormatter(_percent if share else lambda value, _: f"{value:g}"))


def _percent(value: float, _: object = None) -> str:
    """Render a share with no more decimals than it needs."""
    return f"{round(100 * value, 6):g}%"


def _add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put a legend below, and make the figure as much higher as it takes."""
    legend_below(figure, handles)
    figure.set_figheight(figure.get_figheight() + figure.legends[-1].get_window_extent().height / figure.dpi)


def _look(number: int) -> tuple[str, str]:
    """Return colour and marker of a label: no two share both among sixty-four."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw_points(ax: Axes, rows: Sequence[Row], *, style: tuple[str, str]) -> None:
    colour, marker = style
    size, xs, ys = SIZES.get(marker, 1.0) * _scaled(1) ** 2, [r["learned"] for r in rows], [r["kept"] for r in rows]
    if len(rows) > 1:
        ax.scatter(xs, ys, s=6 * size, color=colour, marker=marker, alpha=0.5, linewidths=0, zorder=2)
    mean = (_mean(xs), _mean(ys))
    ax.scatter(*mean, s=26 * size, color=colour, marker=marker, edgecolors="white", linewidths=0.4, zorder=3)


def _label(ax: Axes, columns: Columns) -> None:
    learned, kept = columns["metric"][0], columns["kept_metric"][0]
    ax.set_xlabel(f"learned: held-out {learned}{' (reversed)' if learned == 'perplexity' else ''} →")
    turned = "kept: perplexity on\nother data (reversed) →"
    ax.set_ylabel(turned if kept == "perplexity" else "kept: probe's accuracy\non other data →", linespacing=1.1)
    for axis, shown in ((ax.xaxis, learned), (ax.yaxis, kept)):
        render = (lambda value, _: f"{-value:g}") if shown == "perplexity" else _percent
        axis.set_major_formatter(FuncFormatter(render))
        axis.set_major_locator(MaxNLocator(4 if axis is ax.xaxis else 5))


def _handle(label: str, style: tuple[str, str]) -> Line2D:
    return Line2D([], [], color=style[0], marker=style[1], linestyle="none", markersize=_scaled(4.5), label=label)


def _tick(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="|", linestyle="none", markersize=_scaled(8), label=label)


def _scaled(points: float) -> float:
    """Scale a length that is right beside text of 9 points to the venue's."""
    return points * float(matplotlib.rcParams["font.size"]) / 9


def _draw_bar(ax: Axes, rows: Sequence[Row], *, place: int, name: str, null: str) -> None:
    values = [row[name] for row in rows if _known(row[name])]
    if not values:
        return
    ax.plot(values, [place] * len(values), color=GREY, marker="o", linestyle="none", alpha=0.7, zorder=2, clip_on=False)
    ax.vlines(_mean(values), place - 0.32, place + 0.32, color=BLACK, zorder=3)
    nulls = [row[null] for row in rows if null and _known(row[null])]
    if nulls:
        ax.vlines(_mean(nulls), place - 0.38, place + 0.38, color=NULL_COLOUR, zorder=1)
