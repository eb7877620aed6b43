"""One colour and marker per role, told apart by every kind of sight; sizes per venue."""

from __future__ import annotations

from itertools import combinations

import matplotlib
import numpy as np
import pytest

from deltaspec.architecture.roles import MOST, ORDER
from deltaspec.errors import OptionError
from deltaspec.plots.style import (
    ROLE_STYLE,
    SPARE,
    VENUES,
    label_role,
    legend_below,
    new_figure,
    role_handles,
    role_styles,
    use_venue,
)

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Machado, Oliveira and Fernandes, IEEE TVCG 2009, severity 1, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def to_lab(colour: str, sight: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = RGB_TO_XYZ @ np.clip(SIGHT[sight] @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_role_of_the_vocabulary_has_a_style_in_its_order() -> None:
    assert tuple(ROLE_STYLE) == ORDER


def test_no_two_roles_look_alike() -> None:
    assert len(set(ROLE_STYLE.values())) == len(ROLE_STYLE)


@pytest.mark.parametrize("sight", SIGHT)
def test_usual_roles_differ_for_every_sight(sight: str) -> None:
    colours = [to_lab(ROLE_STYLE[role][0], sight) for role in USUAL]
    nearest = min(float(np.linalg.norm(a - b)) for a, b in combinations(colours, 2))
    assert nearest > 15  # CIE 1976; neighbours in a legend are told apart from about 10


def test_red_and_green_would_fail_the_same_check() -> None:
    assert np.linalg.norm(to_lab("#B85C4A", "deuteranopia") - to_lab("#7F8A33", "deuteranopia")) < 15


def test_unknown_roles_look_unlike_each_other_and_all_known_ones_and_alike_in_every_figure() -> None:
    unknown = [f"W{number}" for number in range(MOST)]
    styles = role_styles([*unknown, *ROLE_STYLE])
    assert len(set(styles.values())) == len(styles) == MOST + len(ROLE_STYLE)
    assert all(styles[role] == look for role, look in ROLE_STYLE.items())
    assert role_styles(["W1", "q_proj"])["W1"] == role_styles(["W1"])["W1"] != role_styles(["W2"])["W2"]


def test_more_roles_than_looks_still_all_have_one() -> None:
    styles = role_styles(f"W{number}" for number in range(len(SPARE) + 3))
    assert list(styles.values()).count(ROLE_STYLE["other"]) == 3


@pytest.mark.parametrize(
    ("role", "label"),
    [("W_out", "W_out"), ("$x$", r"\$x\$"), ("_hidden", " _hidden"), ("a\x1bb", "a?b"), ("x" * 99, "x" * 23 + "…")],
)
def test_a_role_from_a_file_is_printed_as_it_is_called(role: str, label: str) -> None:
    """A formula would be set, or stop the figure where it is none; a leading underscore hides an entry of a legend."""
    assert label_role(role) == label
    with use_venue("neurips"):
        figure = new_figure("neurips", em=20)
        legend_below(figure, role_handles([role]))
        figure.draw_without_rendering()
        (text,) = figure.legends[0].get_texts()
    assert text.get_text() == label


@pytest.mark.parametrize("style", VENUES)
def test_a_long_legend_leaves_the_panels_their_height(style: str) -> None:
    heights = []
    for count in (2, MOST):
        with use_venue(style):
            figure = new_figure(style, em=20)
            ax = figure.subplots()
            legend_below(figure, role_handles(f"a_name_that_is_long_{number}" for number in range(count)))
            figure.draw_without_rendering()  # warnings are errors: a layout that collapses says so
            heights.append(ax.get_window_extent().height / figure.dpi)
    assert heights[1] > 0.6 * heights[0]


@pytest.mark.parametrize(("style", "width", "size"), [("neurips", 5.5, 9), ("icml", 3.25, 8), ("acl", 3.03, 8)])
def test_sizes_are_those_of_the_venue(style: str, width: float, size: float) -> None:
    with use_venue(style):
        assert matplotlib.rcParams["font.size"] == size
        assert new_figure(style, em=20).get_figwidth() == width
    assert set(VENUES) == {"neurips", "icml", "acl", "slides"}


def test_users_settings_neither_matter_nor_change() -> None:
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 33}):
        with use_venue("neurips"):
            assert matplotlib.rcParams["lines.linewidth"] < 2
        assert (matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["font.size"]) == (9, 33)


def test_unknown_style_names_those_that_exist() -> None:
    with pytest.raises(OptionError, match=r"nature.*neurips, icml, acl, slides"):
        use_venue("nature")
