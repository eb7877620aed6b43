"""Draw a finished run or trajectory: every figure, beside the CSV it draws."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from deltaspec.errors import OptionError, RunError
from deltaspec.files.atomic import write_whole
from deltaspec.plots.figures import FIGURES, Draw
from deltaspec.plots.style import find_venue, use_venue
from deltaspec.plots.tables import Columns, Floats
from deltaspec.plots.trajectory import STEP_FIGURES
from deltaspec.store.trajectory import Trajectory
from deltaspec.types import MatrixRecord
from deltaspec.workflows.analysis.shown_roles import with_shown_roles

if TYPE_CHECKING:
    from deltaspec.store.run import Run

# Without a date, the same run always gives the same bytes.
METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


def plot(
    run: Run | Trajectory,
    out: str | Path | None = None,
    *,
    formats: Sequence[str] = ("pdf", "svg", "png"),
    style: str = "neurips",
) -> list[Path]:
    """Write every figure of a run or trajectory, each beside the CSV of what it draws; return the paths.

    Figures by depth are left out where no matrix lies in a block.

    Parameters
    ----------
    run : Run or Trajectory
    out : Path, optional
        Folder, created where it is missing; by default ``figures`` inside the run.
    formats : sequence of pdf, svg, png
    style : neurips, icml, acl or slides

    Raises
    ------
    OptionError
        If a format or the style is unknown.
    RunError
        If the run holds no records, or a file cannot be written.
    """
    find_venue(style)
    check_formats(formats)
    folder = run.path / "figures" if out is None else Path(out)
    written: list[Path] = []
    for name, (columns, draw) in _tabulate(run):
        if columns:
            contents = render_figure(draw(columns, style=style), formats=formats, style=style)
            contents["csv"] = render_csv(columns)
            written += [write_figure(folder / f"{name}.{ending}", data) for ending, data in contents.items()]
    return written


def _tabulate(run: Run | Trajectory) -> Iterator[tuple[str, tuple[Columns, Draw]]]:
    """Yield each figure's name with its columns and how they are drawn."""
    if isinstance(run, Trajectory):
        shown = with_shown_roles([one.records for one in run.runs])
        steps = [(step, records) for step, records in zip(run.steps, shown, strict=True) if records]
        if not steps:
            raise _nothing(run.path)
        yield from ((name, (entry.tabulate(steps), entry.draw)) for name, entry in STEP_FIGURES.items())
        return
    (records,) = with_shown_roles([run.records])
    if not records:
        raise _nothing(run.path)

    def values(record: MatrixRecord) -> Floats:
        singular_values: Floats = run.spectrum(record.store_key).singular_values.numpy()
        return singular_values

    yield from ((name, (entry.tabulate(records, values), entry.draw)) for name, entry in FIGURES.items())


def _nothing(path: Path) -> RunError:
    message = f"Cannot plot '{path}': it holds no finished matrix; run deltaspec analyze to the end first."
    return RunError(message)


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that are not written.

    Raises
    ------
    OptionError
        If there is none, or one is unknown.
    """
    if not formats or any(name not in METADATA for name in formats):
        message = f"--format is '{','.join(formats)}': expected some of {', '.join(METADATA)}."
        raise OptionError(message)


def render_figure(figure: Figure, *, formats: Sequence[str], style: str) -> dict[str, bytes]:
    """Return a figure's bytes in each format; the same figure always gives the same bytes."""
    contents = {}
    with use_venue(style):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, so that every format has the same geometry
        for ending in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=METADATA[ending])
            contents[ending] = buffer.getvalue()
    return contents


def render_csv(columns: Columns) -> bytes:
    """Return columns as CSV: absent numbers are empty, floats have ten digits, which any machine agrees on."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([_cell(value) for value in row])
    return buffer.getvalue().encode()


def _cell(value: object) -> object:
    if value is None or value != value:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else value


def write_figure(path: Path, data: bytes) -> Path:
    """Write one file by atomic rename; returns its path.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    write_whole(path, data, refusal=_unwritable)
    return path


def _unwritable(path: Path, cause: OSError) -> RunError:
    message = f"Cannot write '{path}' ({cause.strerror or cause}): choose a writable folder with -o."
    return RunError(message)
