"""Trainings of one base → one table: what each learned, forgot, cost and changed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaspec.files.atomic import unwritten, whole_file
from deltaspec.options.compare import CompareOptions
from deltaspec.plots.comparison import draw_change, draw_learning
from deltaspec.plots.tables import to_columns
from deltaspec.store.formats.comparison import ComparisonRow, TrainingCosts
from deltaspec.types import Step
from deltaspec.workflows.analysis.write_figures import check_formats, render_csv, render_figure, write_figure
from deltaspec.workflows.comparison.change_measures import measure_changes
from deltaspec.workflows.comparison.finished_trainings import Fields, FinishedTraining, open_base, open_trainings
from deltaspec.workflows.comparison.matrix_measures import FIRST

TABLE = "compare"
FIGURES = {"learning": draw_learning, "change": draw_change}
DRAWN = ("label", "metric", "learned", "kept_metric", "kept", "kept_before")
CHANGED = ("label", "effective_rank", "overlap", "overlap_null", "intruders", "intruders_null")


def compare(
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    options: CompareOptions | None = None,
    progress: Callable[[Step], None] | None = None,
) -> list[ComparisonRow]:
    """Put trainings of one base on one data set side by side: what each learned, forgot, cost, and changed.

    Parameters
    ----------
    folders : sequence of str or Path
        Finished training folders; one with several learning rates stands for its best.
    out : str or Path, optional
        Folder for the table (compare.csv, compare.json), the figures and the spectra; ``runs/compare`` by default. What
        is finished there is not computed again.
    options : CompareOptions, optional
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    list of ComparisonRow
        A dict for each training. ``overlap`` is the median over matrices of φ between the top right singular vectors of
        its ΔW and those of full fine-tuning's, ``overlap_null`` that of random subspaces; ``intruders`` the mean
        number of intruder dimensions of a matrix among the first 10, ``intruders_null`` that of a random change of the
        same norm and rank; ``amplification`` the median of ‖ΔW_k‖/‖UᵀWV‖, ``amplification_null`` that of random
        directions. None where there is no ΔW, or no full fine-tuning to compare with.

    Raises
    ------
    DeltaspecError
        If a folder is no finished training, or they are of different bases, or theirs is gone or was changed.
    """
    options = options or CompareOptions()
    trainings = open_trainings(folders)
    place = Path(out) if out is not None else Path("runs") / TABLE
    base = open_base(trainings)
    changes = measure_changes(base, trainings, place, options=options, progress=progress)
    rows: list[ComparisonRow] = [
        {**describe(trained), **change} for trained, change in zip(trainings, changes, strict=True)
    ]
    _write(place, rows)
    return rows


def describe(trained: FinishedTraining) -> TrainingCosts:
    """Say what one training cost, learned and forgot."""
    report: Fields = trained.report
    results = report["results"]
    learned, forgotten = results.get("learned") or {}, results.get("forgotten") or {}
    metric = "perplexity" if "perplexity" in learned else "accuracy"
    before, after = forgotten.get("before"), forgotten.get("after")
    return {
        "label": trained.label,
        "method": report["method"],
        "folder": str(trained.folder),
        "lr": report["loop"]["lr"],
        "seed": report["loop"]["seed"],
        "steps": results["steps"],
        "trainable": report["counts"]["trainable"],
        "head": report["counts"]["head"],
        "stored": report["counts"]["stored"],
        "metric": metric,
        "learned": learned.get(metric),
        "learned_before": (learned.get("before") or {}).get(metric),
        "kept_metric": forgotten.get("metric"),
        "kept": after,
        "kept_before": before,
        "forgotten": _loss(before, after, forgotten.get("metric")),
        "seconds_per_step": results["seconds_per_step"],
        "peak_memory": results["peak_memory"],
    }


def _loss(before: float | None, after: float | None, metric: str | None) -> float | None:
    """How much worse: accuracy lost, or perplexity gained."""
    if before is None or after is None:
        return None
    return after - before if metric == "perplexity" else before - after


def draw_comparison(
    rows: Sequence[ComparisonRow],
    out: str | Path | None = None,
    *,
    formats: Sequence[str] = ("pdf", "png"),
    style: str = "neurips",
) -> list[Path]:
    """Write the figures of a comparison, each beside the CSV of what it draws; return the paths.

    Parameters
    ----------
    rows : sequence of ComparisonRow
        From ``compare``. Rows of one label are drawn around their mean.
    out : str or Path, optional
        Folder; ``runs/compare`` by default.
    formats, style
        As of ``plot``.

    Raises
    ------
    OptionError
        If a format or the style is unknown.
    RunError
        If a file cannot be written.
    """
    check_formats(formats)
    folder, written = Path(out) if out is not None else Path("runs") / TABLE, []
    drawn = {
        "learning": [_signed(row) for row in rows if row["learned"] is not None and row["kept"] is not None],
        "change": [_shared(row) for row in rows if row["effective_rank"] is not None],
    }
    for name, draw in FIGURES.items():
        if drawn[name]:
            columns = to_columns(drawn[name])
            contents = render_figure(draw(columns, style=style), formats=formats, style=style)
            contents["csv"] = render_csv(columns)
            written += [write_figure(folder / f"{name}.{ending}", data) for ending, data in contents.items()]
    return written


def _signed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn perplexities round, so that more is better."""
    drawn = {name: row[name] for name in DRAWN}
    for metric, names in (("metric", ("learned",)), ("kept_metric", ("kept", "kept_before"))):
        if drawn[metric] == "perplexity":
            drawn |= {name: -drawn[name] for name in names if drawn[name] is not None}
    return drawn


def _shared(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn counts of intruders into shares of the vectors looked at."""
    drawn = {name: row[name] for name in CHANGED}
    return drawn | {name: row[name] / FIRST for name in CHANGED[-2:] if row[name] is not None}


def _write(place: Path, rows: Sequence[ComparisonRow]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = {"csv": buffer.getvalue(), "json": json.dumps(rows, indent=1, ensure_ascii=False)}
    try:
        for ending, text in texts.items():
            with whole_file(place / f"{TABLE}.{ending}") as stream:
                stream.write(text.encode())
    except OSError as cause:
        raise unwritten(place, cause) from cause
