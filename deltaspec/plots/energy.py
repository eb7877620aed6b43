"""Share of the squared Frobenius norm kept against rank, a line per role."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from deltaspec.architecture.roles import order_roles
from deltaspec.plots.style import (
    GUIDE_COLOUR,
    SYMBOLS,
    Looks,
    legend_below,
    new_figure,
    role_handles,
    role_styles,
    use_venue,
)
from deltaspec.plots.tables import Columns, Row, order_stacks, to_rows

GUIDE = 0.9


def draw_energy(columns: Columns, *, style: str = "neurips") -> Figure:
    """Draw the share of ‖ΔW‖² that the top singular values hold: median over layers, band between the quartiles.

    Parameters
    ----------
    columns : Columns
        From ``tabulate_energy``, at least one row.
    style : str
        A name of ``VENUES``.

    Returns
    -------
    Figure
        One panel per stack, with a guide at 90 %.

    Raises
    ------
    OptionError
        If there is no such style.
    """
    rows = to_rows(columns)
    stacks, styles = order_stacks(columns["stack"]), role_styles(columns["role"])
    with use_venue(style):
        figure = new_figure(style, em=21)
        axes = figure.subplots(1, len(stacks), squeeze=False, sharey=True)[0]
        for stack, ax in zip(stacks, axes, strict=True):
            _draw_shares(ax, [row for row in rows if row["stack"] == stack], styles)
            ax.set_title(stack)
            ax.set_xlabel("rank")
        axes[0].set_ylabel(rf"share of $\Vert {SYMBOLS[rows[0]['spectrum_of']]}\Vert^2$ kept")
        legend_below(figure, role_handles(columns["role"]))
    return figure


def _draw_shares(ax: Axes, rows: Sequence[Row], styles: Looks) -> None:
    ax.axhline(GUIDE, color=GUIDE_COLOUR, zorder=0)
    for place, role in enumerate(order_roles(row["role"] for row in rows)):
        line = [row for row in rows if row["role"] == role]
        ranks = [row["rank"] for row in line]
        colour, marker = styles[role]
        low, high = ([row[f"energy_kept_{end}"] for row in line] for end in ("q25", "q75"))
        ax.fill_between(ranks, low, high, color=colour, alpha=0.1, linewidth=0)
        kept = [row["energy_kept"] for row in line]
        # Markers sit at other ranks for each role, so that lines which coincide still show theirs.
        ax.plot(ranks, kept, color=colour, marker=marker, markevery=(0.02 * (place % 7), 0.14), label=role)
    ax.set(
        xscale="log",
        xlim=(0.9, 1.1 * max(row["rank"] for row in rows)),
        ylim=(0, 1.02),
        yticks=(0, 0.25, 0.5, 0.75, GUIDE, 1),
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.xaxis.set_major_locator(LogLocator(numticks=6))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
