"""The figures as pixels, against golden images that ``make_golden.py`` draws."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from deltaspec.plots.figures import FIGURES
from tests.figures.make_golden import GOLDEN, draw_figure, rasterise

# Blocks of pixels forgive another version's text rendering; a line in another colour they do not.
BLOCK = 3
TOLERANCE = 4.0
ROOT = GOLDEN.parent.parent.parent
DREW = json.loads((GOLDEN / "versions.json").read_text(encoding="utf-8"))["matplotlib"]

# Another matplotlib spaces its axes otherwise. Where it is chosen by --lowest, --newest or --bare that is no mistake;
# among the pinned packages it is one, and the images are drawn again.
same_matplotlib = pytest.mark.skipif(
    version("matplotlib") != DREW and os.environ.get("DELTASPEC_EXTRAS") in {"lowest", "newest", "bare"},
    reason=f"drawn by matplotlib {DREW}, here is {version('matplotlib')}",
)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square over blocks, in grey levels of 0…255."""
    height, width = (side // BLOCK * BLOCK for side in a.shape[:2])

    def average(image: np.ndarray) -> np.ndarray:
        cut = image[:height, :width].astype(float)
        return cut.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).mean(axis=(1, 3))

    return float(np.sqrt(np.square(average(a) - average(b)).mean()))


def read_golden(name: str) -> np.ndarray:
    return np.asarray(Image.open(GOLDEN / f"{name}.png").convert("RGB"))


@same_matplotlib
@pytest.mark.parametrize("name", FIGURES)
def test_looks_as_it_did(name: str) -> None:
    drawn, golden = rasterise(draw_figure(name)), read_golden(name)
    assert drawn.shape == golden.shape
    assert distance(drawn, golden) < TOLERANCE


def test_the_pinned_matplotlib_drew_them() -> None:
    """Or nothing compares them any more."""
    pinned = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"matplotlib=={DREW}" in pinned


@same_matplotlib
def test_a_figure_without_its_lines_is_noticed() -> None:
    figure = draw_figure("rank_by_depth")
    for ax in figure.axes:
        for line in list(ax.lines):
            line.remove()
    assert distance(rasterise(figure), read_golden("rank_by_depth")) > TOLERANCE
