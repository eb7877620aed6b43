"""What the ΔW of several trainings have to do with each other, with their base, and with random changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median

from deltaspec.engine.local import resolve_devices
from deltaspec.options.compare import CompareOptions
from deltaspec.spectra.subspaces import Similarity, compare_subspaces
from deltaspec.store.formats.comparison import ChangeSummary
from deltaspec.store.pieces import Pieces
from deltaspec.store.training_folder import FINAL
from deltaspec.types import Step
from deltaspec.workflows.analysis.analyze import analyze_against
from deltaspec.workflows.analysis.weight_changes import open_changes
from deltaspec.workflows.comparison.finished_trainings import FinishedTraining
from deltaspec.workflows.comparison.matrix_measures import AnalyzedTraining, MeasuredMatrix, measure_matrices
from deltaspec.workflows.comparison.rows import NOTHING
from deltaspec.workflows.shared.fill_run import Execution
from deltaspec.workflows.shared.opened_base import Base

Summary = Callable[[list[float]], float]


def measure_changes(
    base: Base,
    trainings: Sequence[FinishedTraining],
    place: Path,
    *,
    options: CompareOptions,
    progress: Callable[[Step], None] | None,
) -> list[ChangeSummary]:
    """Analyse every training's ΔW into a run under ``place``, and summarise each over the matrices that it changes.

    Parameters
    ----------
    base : Base
        Of all of them.
    trainings : sequence of FinishedTraining
    place : Path
        What is finished there is not computed again.
    options : CompareOptions
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    list of ChangeSummary
        One for each training; all None where there is no ΔW.
    """
    changing, settings = [one for one in trainings if one.changes_weights], options.analysis()
    execution = Execution(settings, progress)
    runs = [analyze_against(base, one.folder / FINAL, place / "runs" / one.run_name, execution) for one in changing]
    device = resolve_devices(options.device, 1)[0]
    with ExitStack() as keep:
        openings = [open_changes(base, one.folder / FINAL, settings, device=device, keep=keep) for one in changing]
        analyzed = [AnalyzedTraining(*parts) for parts in zip(changing, runs, openings, strict=True)]
        rows = measure_matrices(analyzed, Pieces(place / "matrices"), options, progress)
    known = {one.training.folder: (one, own) for one, own in zip(analyzed, rows, strict=True)}
    found = []
    for trained in trainings:
        if trained.folder not in known:
            found.append(NOTHING)
            continue
        one, own = known[trained.folder]
        other = choose_reference(trained, trainings)
        overlaps = _overlaps(one, known[other.folder][0], options.directions) if other else []
        found.append(_summarise(one, own, overlaps, other))
    return found


def choose_reference(trained: FinishedTraining, trainings: Sequence[FinishedTraining]) -> FinishedTraining | None:
    """Return the full fine-tuning that a training is compared with: of its seed if there is one, never itself.

    Full fine-tuning is compared with that of another seed, which says how far two of one kind agree.
    """
    others = [other for other in trainings if other.report["method"] == "full" and other.folder != trained.folder]
    return next((other for other in others if other.seed == trained.seed), others[0] if others else None)


def _overlaps(one: AnalyzedTraining, other: AnalyzedTraining, directions: int) -> list[Similarity]:
    """φ of the top right singular vectors, and its null, for each matrix that both trainings change."""
    found, known = [], {record.store_key for record in other.records()}
    for record in one.records():
        if record.store_key in known:
            first, second = one.run.spectrum(record.store_key).right, other.run.spectrum(record.store_key).right
            assert first is not None
            assert second is not None
            found.append(compare_subspaces(first[:, :directions], second[:, :directions]))
    return found


def _summarise(
    one: AnalyzedTraining, rows: list[MeasuredMatrix], overlaps: list[Similarity], other: FinishedTraining | None
) -> ChangeSummary:
    changed = [record.metrics for record in one.records()]
    return ChangeSummary(
        changed=len(changed),
        relative_norm=_middle(metrics["relative_norm"] for metrics in changed),
        effective_rank=_middle(metrics["effective_rank"] for metrics in changed),
        rank_90=_middle(metrics["rank_90"] for metrics in changed),
        overlap=_middle(similar.phi for similar in overlaps),
        overlap_null=_middle(similar.null for similar in overlaps),
        overlap_with=f"{other.label}, seed {other.seed}" if other and overlaps else None,
        amplification=_middle(row["amplification"] for row in rows),
        amplification_null=_middle(row["amplification_null"] for row in rows),
        intruders=_middle((row.get("intruders") for row in rows), mean),
        intruders_null=_middle((row.get("intruders_null") for row in rows), mean),
        intruder_energy=_middle((row.get("intruder_energy") for row in rows), mean),
    )


def _middle(values: Iterable[float | None], summarise: Summary = median) -> float | None:
    """Summarise those that are there and finite; None where there are none."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return summarise(known) if known else None
