"""What the ΔW of several trainings have to do with each other, with their base, and with random changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from deltaspec.engine.local import resolve_devices
from deltaspec.options.compare import CompareOptions
from deltaspec.spectra.subspaces import amplify, compare_subspaces, find_intruders, random_change
from deltaspec.store.pieces import Pieces
from deltaspec.store.run import Run
from deltaspec.store.training_folder import FINAL
from deltaspec.types import MatrixRecord, Step
from deltaspec.workflows.analysis.analyze import analyze_against
from deltaspec.workflows.analysis.weight_changes import Change, open_changes
from deltaspec.workflows.comparison.finished_trainings import Trained
from deltaspec.workflows.shared.fill_run import Execution, work_of
from deltaspec.workflows.shared.opened_base import Base

FIRST = 10  # left singular vectors of W + ΔW among which intruders are counted, as published
Row = dict[str, Any]
NOTHING: Row = dict.fromkeys(
    (
        *("changed", "relative_norm", "effective_rank", "rank_90", "overlap", "overlap_null", "overlap_with"),
        *("amplification", "amplification_null", "intruders", "intruders_null", "intruder_energy"),
    )
)


def measure_changes(
    base: Base,
    trainings: Sequence[Trained],
    place: Path,
    *,
    options: CompareOptions,
    progress: Callable[[Step], None] | None,
) -> dict[Path, Row]:
    """Analyse every training's ΔW into a run under ``place``, and summarise each over the matrices that it changes."""
    runs = {
        trained.folder: analyze_against(
            base,
            trained.folder / FINAL,
            place / "runs" / trained.run_name,
            Execution(options.analysis(), progress),
        )
        for trained in trainings
        if trained.changes_weights
    }
    found = dict.fromkeys((trained.folder for trained in trainings), NOTHING)
    with ExitStack() as keep:
        device = resolve_devices(options.device, 1)[0]
        changes = {
            folder: open_changes(
                base, folder / FINAL, options.analysis(), device=device, keep=keep, name=f"compared-{number}"
            )
            for number, folder in enumerate(runs)
        }
        rows = _measure_all(runs, changes, Pieces(place / "matrices"), options=options, progress=progress)
    for trained in trainings:
        if trained.folder in runs:
            other = choose_reference(trained, trainings)
            overlaps = _overlaps(runs[trained.folder], runs[other.folder], options.directions) if other else []
            found[trained.folder] = _summarise(runs[trained.folder], rows[trained.folder], overlaps, other)
    return found


def choose_records(run: Run) -> list[MatrixRecord]:
    """Return the matrices of the blocks that a training changed; of a model without blocks any.

    Embeddings, poolers and heads stay out: methods differ in whether they train them, and medians would tell that.
    """
    inside = [record for record in run.records if record.key.depth is not None]
    return [record for record in inside or run.records if record.metrics["frobenius_norm"]]


def choose_reference(trained: Trained, trainings: Sequence[Trained]) -> Trained | None:
    """Return the full fine-tuning that a training is compared with: of its seed if there is one, never itself.

    Full fine-tuning is compared with that of another seed, which says how far two of one kind agree.
    """
    others = [other for other in trainings if other.report["method"] == "full" and other.folder != trained.folder]
    return next((other for other in others if other.seed == trained.seed), others[0] if others else None)


def _measure_all(
    runs: dict[Path, Run],
    changes: dict[Path, dict[str, Change]],
    pieces: Pieces,
    *,
    options: CompareOptions,
    progress: Callable[[Step], None] | None,
) -> dict[Path, list[Row]]:
    """Measure amplification and intruders of every matrix; the base's is decomposed once for all trainings."""
    todo: dict[str, list[Path]] = {}
    for folder, run in runs.items():
        for record in choose_records(run):
            todo.setdefault(record.store_key, []).append(folder)
    found: dict[Path, list[Row]] = {folder: [] for folder in runs}
    sizes = {key: work_of(changes[folders[0]][key].shape) * len(folders) for key, folders in todo.items()}
    finished = weights = 0
    for done, (key, folders) in enumerate(todo.items(), start=1):
        names = {
            folder: f"{runs[folder].path.name}/{key}/{options.directions}{options.intruders}" for folder in folders
        }
        rows = {folder: pieces.row(name) for folder, name in names.items()}
        if not all(rows.values()):
            base = _Base(changes[folders[0]][key], intruders=options.intruders)
            for folder in folders:
                if rows[folder] is None:
                    rows[folder] = _measure(runs[folder], changes[folder][key], base)
                    pieces.put(names[folder], rows[folder] or {}, {})
        for folder, row in rows.items():
            found[folder].append(row or {})
        finished, weights = finished + sizes[key], weights + math.prod(changes[folders[0]][key].shape)
        if progress:
            progress(Step(done, len(todo), 0, finished, sum(sizes.values()), weights))
    return found


class _Base:
    """W of one matrix, with all of its left singular vectors where intruders are looked for."""

    def __init__(self, change: Change, *, intruders: bool) -> None:
        self.weight = change.weight()
        self.left = torch.linalg.svd(self.weight, full_matrices=False).U if intruders else None


def _measure(run: Run, change: Change, base: _Base) -> Row:
    spectrum = run.spectrum(str(change.key))
    assert spectrum.left is not None
    assert spectrum.right is not None
    rank = spectrum.left.shape[1]
    norm = float(spectrum.singular_values[:rank].norm())  # of those directions alone, or more of them would weigh less
    device = base.weight.device
    found = amplify(base.weight, spectrum.left.to(device), spectrum.right.to(device), norm=norm)
    row: Row = {"amplification": found.factor, "amplification_null": norm / found.null if found.null else math.inf}
    if base.left is None:
        return row
    random = random_change(spectrum.singular_values, change.shape, seed=0)
    null, seen = _intruders(base, random[0].to(device) @ random[1].to(device)), _intruders(base, change.delta())
    return {**row, "intruders": seen[0], "intruder_energy": seen[1], "intruders_null": null[0]}


def _intruders(base: _Base, delta: Tensor) -> tuple[int, float]:
    assert base.left is not None
    left, values, _ = torch.linalg.svd(base.weight + delta, full_matrices=False)
    found = find_intruders(left[:, :FIRST], values, base.left, energy=float(values.square().sum()))
    return found.count, found.energy_share


def _overlaps(run: Run, other: Run, directions: int) -> list[tuple[float, float]]:
    """φ of the top right singular vectors, and its null, for each matrix that both trainings change."""
    found, known = [], {record.store_key for record in choose_records(other)}
    for record in choose_records(run):
        if record.store_key in known:
            first, second = run.spectrum(record.store_key).right, other.spectrum(record.store_key).right
            assert first is not None
            assert second is not None
            similar = compare_subspaces(first[:, :directions], second[:, :directions])
            found.append((similar.phi, similar.null))
    return found


def _summarise(run: Run, rows: list[Row], overlaps: list[tuple[float, float]], other: Trained | None) -> Row:
    changed = [record.metrics for record in choose_records(run)]
    ranks = ("relative_norm", "effective_rank", "rank_90")

    def middle(values: list[Any], summarise: Callable[[list[float]], float] = median) -> float | None:
        known = [float(value) for value in values if value is not None and math.isfinite(value)]
        return summarise(known) if known else None

    return {
        **NOTHING,
        "changed": len(changed),
        **{name: middle([metrics[name] for metrics in changed]) for name in ranks},
        "overlap": middle([phi for phi, _ in overlaps]),
        "overlap_null": middle([null for _, null in overlaps]),
        "overlap_with": f"{other.label}, seed {other.seed}" if other and overlaps else None,
        **{name: middle([row.get(name) for row in rows]) for name in ("amplification", "amplification_null")},
        **{
            name: middle([row.get(name) for row in rows], mean)
            for name in ("intruders", "intruders_null", "intruder_energy")
        },
    }
