"""What trainings learned, forgot and changed: one point or bar for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

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
NAMES = {"accuracy": "accuracy", "perplexity": "perplexity", "probe": "probe's accuracy"}


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
        One panel; a dotted line marks the base.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = [row for row in to_rows(columns) if _known(row["learned"]) and _known(row["kept"])]
    labels = list(dict.fromkeys(columns["label"]))
    with use_venue(style):
        narrow = find_venue(style).narrow
        figure = new_figure(style, em=(24 if narrow else 20) + 1.2 * len(labels) / (2 if narrow else 5))
        ax = figure.subplots()
        for label in dict.fromkeys(row["label"] for row in rows):
            members = [row for row in rows if row["label"] == label]
            _draw_points(ax, members, style=_look(labels.index(label)))
        for row in rows[:1]:
            if _known(row["kept_before"]):
                ax.axhline(row["kept_before"], color=GUIDE_COLOUR, linestyle=":", zorder=1)
        _label(ax, columns)
        ax.margins(0.06)
        legend_below(figure, [_handle(label, _look(number)) for number, label in enumerate(labels)])
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
        random directions score.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = [row for row in to_rows(columns) if _known(row["effective_rank"])]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    panels = (
        ("effective_rank", "", "effective rank"),
        ("overlap", "overlap_null", "overlap with\nfull fine-tuning"),
        ("intruders", "intruders_null", "intruder\ndimensions"),
    )
    with use_venue(style):
        figure = new_figure(style, em=7 + 1.7 * max(len(labels), 2))
        axes = figure.subplots(1, 3, sharey=True)
        for ax, (name, null, title) in zip(axes, panels, strict=True):
            for place, label in enumerate(labels):
                members = [row for row in rows if row["label"] == label]
                _draw_bar(ax, members, place=place, name=name, null=null)
            ax.set_xlabel(title, linespacing=1.1)
            if not null and all(row[name] > 0 for row in rows):
                ax.set_xscale("log")
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                ax.xaxis.set_minor_formatter(NullFormatter())
            elif null:
                ax.set_xlim(0, None)
                ax.xaxis.set_major_formatter(PercentFormatter(1.0))
                ax.xaxis.set_major_locator(MaxNLocator(3))
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.5, -0.5)
        for ax in axes[1:]:
            ax.tick_params(left=False)
        legend_below(figure, [_tick("black", "mean"), _tick(NULL_COLOUR, "random directions")])
    return figure


def _look(number: int) -> tuple[str, str]:
    """Return colour and marker of a label: no two share both among sixty-four."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw_points(ax: Axes, rows: Sequence[Row], *, style: tuple[str, str]) -> None:
    colour, marker = style
    xs, ys = [row["learned"] for row in rows], [row["kept"] for row in rows]
    if len(rows) > 1:
        ax.scatter(xs, ys, s=5, color=colour, marker=marker, alpha=0.5, linewidths=0, zorder=2)
    ax.scatter(_mean(xs), _mean(ys), s=26, color=colour, marker=marker, edgecolors="white", linewidths=0.4, zorder=3)


def _label(ax: Axes, columns: Columns) -> None:
    name = NAMES.get(columns["metric"][0], columns["metric"][0])
    kept = NAMES.get(columns["kept_metric"][0] or "", "")
    ax.set_xlabel(
        f"learned: held-out {name} →" if name != "perplexity" else "learned: held-out perplexity (reversed) →"
    )
    ax.set_ylabel(
        f"kept: {kept}\non other data →" if kept != "perplexity" else "kept: perplexity on\nother data (reversed) →"
    )
    for axis, shown in ((ax.xaxis, name), (ax.yaxis, kept)):
        if shown == "perplexity":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}"))
        else:
            axis.set_major_formatter(PercentFormatter(1.0))
        axis.set_major_locator(MaxNLocator(5))


def _handle(label: str, style: tuple[str, str]) -> Line2D:
    return Line2D([], [], color=style[0], marker=style[1], linestyle="none", markersize=4.5, label=label)


def _tick(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="|", linestyle="none", markersize=8, label=label)


def _draw_bar(ax: Axes, rows: Sequence[Row], *, place: int, name: str, null: str) -> None:
    values = [row[name] for row in rows if _known(row[name])]
    if not values:
        return
    ax.plot(values, [place] * len(values), color=GREY, marker="o", linestyle="none", alpha=0.7, zorder=2, clip_on=False)
    ax.vlines(_mean(values), place - 0.32, place + 0.32, color=BLACK, zorder=3)
    nulls = [row[null] for row in rows if null and _known(row[null])]
    if nulls:
        ax.vlines(_mean(nulls), place - 0.38, place + 0.38, color=NULL_COLOUR, zorder=1)
