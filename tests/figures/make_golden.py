"""Draw the golden images again: ``python -m tests.figures.make_golden``, from the repository's root."""

from __future__ import annotations

import io
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from deltaspec.plots.figures import FIGURES
from deltaspec.plots.style import use_venue
from tests.figures import synthetic

GOLDEN = Path(__file__).with_name("golden")
DPI = 60


def draw_figure(name: str) -> Figure:
    run = synthetic.mixture()
    entry = FIGURES[name]
    return entry.draw(entry.tabulate(run.records, run.values))


def rasterise(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8."""
    buffer = io.BytesIO()
    with use_venue("neurips"):
        figure.savefig(buffer, format="png", dpi=DPI)
    return np.asarray(Image.open(buffer).convert("RGB"))


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in FIGURES:
        Image.fromarray(rasterise(draw_figure(name))).save(GOLDEN / f"{name}.png", optimize=True)
    versions = {package: version(package) for package in ("matplotlib", "numpy", "pillow")}
    text = json.dumps({"python": platform.python_version(), **versions}, indent=1)
    (GOLDEN / "versions.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
