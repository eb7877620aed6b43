"""Sizes per venue, and one colour and marker per role: the same in every figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deltaspec.architecture.roles import order_roles
from deltaspec.errors import OptionError

MPLSTYLE = Path(__file__).with_name("deltaspec.mplstyle")
NULL_COLOUR = "#8C8C8C"
GUIDE_COLOUR = "#BFBFBF"


@dataclass(frozen=True, slots=True)
class Venue:
    """Where a figure will be printed: width in inches, font size in points, font family."""

    width: float
    font_size: float
    family: str = "STIXGeneral"
    maths: str = "stix"

    @property
    def narrow(self) -> bool:
        """Whether one column of a two-column page: too narrow for panels side by side."""
        return self.width < 0.5 * self.font_size

    def height(self, em: float) -> float:
        """Return ``em`` font sizes in inches, so that every venue gets the same proportions."""
        return em * self.font_size / 72


# STIX and DejaVu ship with matplotlib: the same on every machine. STIX goes with papers set in Times.
# NeurIPS and ICLR set text 5.5 in wide; ICML's column is 3.25 in; ACL's column is 7.7 cm on A4.
VENUES = {
    "neurips": Venue(5.5, 9),
    "icml": Venue(3.25, 8),
    "acl": Venue(3.03, 8),
    "slides": Venue(10.0, 18, "DejaVu Sans", "dejavusans"),
}

# Points at a font size of 9; other venues scale them with their own.
LENGTHS = {
    "axes.linewidth": 0.5,
    "axes.labelpad": 2.5,
    "axes.titlepad": 3.0,
    "hatch.linewidth": 0.4,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.0,
    "lines.markeredgewidth": 0.7,
    **{
        f"{axis}tick.{kind}.{part}": size
        for axis in "xy"
        for kind, part, size in (
            ("major", "size", 2.5),
            ("major", "width", 0.5),
            ("major", "pad", 2.0),
            ("minor", "size", 1.5),
            ("minor", "width", 0.35),
        )
    },
}

# Okabe and Ito's colours for the seven usual roles, told apart by every kind of sight; rarer roles share a colour
# with other markers, so that a pair (colour, marker) never means two roles. The order is that of the vocabulary.
BLUE, SKY, GREEN, PINK = "#0072B2", "#56B4E9", "#009E73", "#CC79A7"
ORANGE, VERMILLION, BLACK = "#E69F00", "#D55E00", "#000000"
PURPLE, BROWN, GREY = "#7B3294", "#8C510A", "#7F7F7F"

ROLE_STYLE: dict[str, tuple[str, str]] = {
    "q_proj": (BLUE, "o"),
    "k_proj": (SKY, "s"),
    "v_proj": (GREEN, "^"),
    "qkv_proj": (BLUE, "P"),
    "o_proj": (PINK, "D"),
    "gate_proj": (ORANGE, "v"),
    "up_proj": (VERMILLION, "P"),
    "gate_up_proj": (ORANGE, "X"),
    "down_proj": (BLACK, "X"),
    "router": (GREY, "*"),
    "embed": (PURPLE, "o"),
    "position_embed": (PURPLE, "^"),
    "token_type_embed": (PURPLE, "v"),
    "time_embed": (PURPLE, "D"),
    "conv": (BROWN, "o"),
    "proj_in": (BROWN, "s"),
    "proj_out": (BROWN, "D"),
    "projection": (BROWN, "^"),
    "pooler": (GREY, "s"),
    "classifier": (GREY, "D"),
    "lm_head": (PURPLE, "s"),
    "norm": (GREY, "^"),
    "bias": (GREY, "v"),
    "other": (GREY, "o"),
}

Looks = dict[str, tuple[str, str]]
"""Role → (colour, marker)."""

# For roles outside the vocabulary: every other pair of a colour and a marker.
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, PINK, BROWN, BLACK, GREY)
MARKERS = ("<", ">", "p", "h", "d", "8", "o", "s", "^", "D", "v", "P", "X", "*")
SPARE = tuple(look for look in product(COLOURS, MARKERS) if look not in ROLE_STYLE.values())
FEW_LINES = 5  # of a legend, which a figure has room for
LONGEST = 24  # characters of a role in a figure

# What the matrix is called on an axis, by the record's spectrum_of.
SYMBOLS = {"delta": r"\Delta W", "tuned": "W", "base": "W"}


def label_rank(name: str, spectrum_of: str, *, join: str = " ") -> str:
    """Return the axis label of ``effective_rank`` or ``rank_90``; ``join`` may break the longer one in two."""
    if name == "effective_rank":
        return "effective rank"
    return rf"rank keeping 90 %{join}of $\Vert {SYMBOLS[spectrum_of]}\Vert^2$"


def role_styles(roles: Iterable[str]) -> Looks:
    """Map each role, in the order of ``order_roles``, to its (colour, marker).

    One outside the vocabulary has the pair that its name picks, the same in every figure, or the next that is free; of
    more than there are pairs, the last look like ``other``.
    """
    styles: Looks = {}
    for role in order_roles(roles):
        first = crc32(role.encode(errors="replace")) % len(SPARE)
        free = (look for look in (*SPARE[first:], *SPARE[:first]) if look not in styles.values())
        styles[role] = ROLE_STYLE[role] if role in ROLE_STYLE else next(free, ROLE_STYLE["other"])
    return styles


def label_role(role: str) -> str:
    """Return a role as a figure prints it: a name from a file may be long, a formula, or hidden from legends by `_`."""
    clean = "".join(c if c.isprintable() else "?" for c in role)
    clean = clean if len(clean) <= LONGEST else f"{clean[: LONGEST - 1]}…"
    return (" " if clean.startswith("_") else "") + clean.replace("$", r"\$")


def find_venue(style: str) -> Venue:
    """Return the venue of that name.

    Raises
    ------
    OptionError
        If there is none.
    """
    if style not in VENUES:
        message = f"--style is '{style}': expected {', '.join(VENUES)}."
        raise OptionError(message)
    return VENUES[style]


def use_venue(style: str) -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws and saves for a venue, whatever the user's own settings are.

    Parameters
    ----------
    style : str
        A name of ``VENUES``.

    Raises
    ------
    OptionError
        If there is no such venue.
    """
    venue = find_venue(style)
    small = venue.font_size - 1
    sizes: dict[str, Any] = {
        "font.family": venue.family,
        "mathtext.fontset": venue.maths,
        "font.size": venue.font_size,
        "axes.labelsize": venue.font_size,
        "axes.titlesize": small,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "legend.fontsize": small,
        "figure.figsize": (venue.width, venue.width / 2),
    }
    sizes |= {name: size * venue.font_size / 9 for name, size in LENGTHS.items()}
    return matplotlib.style.context(["default", MPLSTYLE, sizes])


def new_figure(style: str, *, em: float) -> Figure:
    """Return an empty figure as wide as the venue and ``em`` font sizes high."""
    venue = find_venue(style)
    return Figure(figsize=(venue.width, venue.height(em)), layout="constrained")


def role_handles(roles: Iterable[str]) -> list[Line2D]:
    """Return the legend's entry of each role."""
    looks = role_styles(roles).items()
    return [Line2D([], [], color=colour, marker=marker, label=label_role(role)) for role, (colour, marker) in looks]


def rounding_handle() -> Line2D:
    """Return the legend's entry for hollow points."""
    return Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none", label="counts rounding")


def median_handle() -> Line2D:
    """Return the legend's entry for a median's tick."""
    return _tick_handle("black", "median")


def null_handle() -> Line2D:
    """Return the legend's entry for what noise of the same shape scores."""
    return _tick_handle(NULL_COLOUR, "noise of the same shape")


def _tick_handle(colour: str, label: str) -> Line2D:
    size, width = matplotlib.rcParams["font.size"], matplotlib.rcParams["lines.linewidth"]
    return Line2D(
        [], [], color=colour, marker="|", markersize=size, markeredgewidth=width, linestyle="none", label=label
    )


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put one legend under all panels, in as few lines as the width allows; many lines make the figure higher."""
    width = figure.get_figwidth() * figure.dpi
    for lines in range(1, len(handles) + 1):
        columns = math.ceil(len(handles) / lines)
        legend = figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= 0.98 * width:
            more = 1.4 * max(lines - FEW_LINES, 0) * matplotlib.rcParams["font.size"] / 72
            figure.set_figheight(figure.get_figheight() + more)
            return
        legend.remove()
