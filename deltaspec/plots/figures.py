"""Every figure: what it draws, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from matplotlib.figure import Figure

from deltaspec.plots.energy import draw_energy
from deltaspec.plots.heatmap import draw_heatmap, select_ratios
from deltaspec.plots.rank_by_depth import draw_rank_by_depth, select_depths
from deltaspec.plots.rank_by_role import draw_rank_by_role
from deltaspec.plots.spectrum import choose_matrices, draw_spectrum, tabulate_spectra
from deltaspec.plots.tables import Columns, Values, tabulate_cells, tabulate_energy
from deltaspec.types import MatrixRecord


class Draw(Protocol):
    """Columns in, Figure out."""

    def __call__(self, columns: Columns, *, style: str = "neurips") -> Figure:
        """Draw."""


class FigureEntry(NamedTuple):
    """How one figure is made; ``tabulate`` gives no columns where the run holds nothing to draw."""

    tabulate: Callable[[Sequence[MatrixRecord], Values], Columns]
    draw: Draw
    about: str


FIGURES: dict[str, FigureEntry] = {
    "rank_by_depth": FigureEntry(
        lambda records, _: select_depths(tabulate_cells(records)),
        draw_rank_by_depth,
        "effective rank and rank_90 by depth, a line per role",
    ),
    "rank_by_role": FigureEntry(
        lambda records, _: tabulate_cells(records),
        draw_rank_by_role,
        "effective rank and rank_90 of every layer, a row per role",
    ),
    "heatmap": FigureEntry(
        lambda records, _: select_ratios(tabulate_cells(records)),
        draw_heatmap,
        "effective rank as a share of that of noise, layer × role",
    ),
    "spectrum": FigureEntry(
        lambda records, values: tabulate_spectra(choose_matrices(records), values),
        draw_spectrum,
        "singular values of each role's middle layer, with the rounding edge and noise",
    ),
    "energy": FigureEntry(tabulate_energy, draw_energy, "share of ‖ΔW‖² kept against rank, a line per role"),
}
