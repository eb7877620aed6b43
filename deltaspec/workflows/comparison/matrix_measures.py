"""One matrix of several trainings: what each ΔW amplifies, and which directions it brings that W does not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor

from deltaspec.options.compare import CompareOptions
from deltaspec.spectra.subspaces import amplify, find_intruders, random_change
from deltaspec.store.pieces import Pieces
from deltaspec.store.run import Run
from deltaspec.types import MatrixRecord
from deltaspec.workflows.analysis.weight_changes import Change
from deltaspec.workflows.comparison.finished_trainings import FinishedTraining
from deltaspec.workflows.shared.fill_run import work_of
from deltaspec.workflows.shared.workers import Headway, OnStep

FIRST = 10  # left singular vectors of W + ΔW among which intruders are counted, as published


class MeasuredMatrix(TypedDict):
    """What is measured of one matrix; intruders where they are looked for."""

    amplification: float
    amplification_null: float
    intruders: NotRequired[int]
    intruder_energy: NotRequired[float]
    intruders_null: NotRequired[int]


@dataclass(frozen=True, slots=True)
class PieceKey:
    """Which piece of work a row is: of a training's run, one matrix, under these options; prints as its stored key."""

    run: str
    matrix: str
    directions: int
    intruders: bool

    def __str__(self) -> str:
        """Print as the stored key."""
        return f"{self.run}/{self.matrix}/{self.directions}{self.intruders}"


@dataclass(frozen=True, slots=True)
class AnalyzedTraining:
    """A training, the run of its ΔW, and what forms W and ΔW anew, by matrix."""

    training: FinishedTraining
    run: Run
    changes: dict[str, Change]

    def records(self) -> list[MatrixRecord]:
        """Return the matrices of the blocks that it changed; of a model without blocks any.

        Embeddings, poolers and heads stay out: methods differ in whether they train them, and medians would tell that.
        """
        inside = [record for record in self.run.records if record.key.depth is not None]
        return [record for record in inside or self.run.records if record.metrics["frobenius_norm"]]

    def piece(self, matrix: str, options: CompareOptions) -> PieceKey:
        """Return the key under which what is measured of a matrix is kept."""
        return PieceKey(self.run.path.name, matrix, options.directions, options.intruders)


def measure_matrices(
    trainings: Sequence[AnalyzedTraining],
    pieces: Pieces,
    options: CompareOptions,
    progress: OnStep | None,
) -> list[list[MeasuredMatrix]]:
    """Measure amplification and intruders of every matrix; the base's is decomposed once for all trainings.

    Parameters
    ----------
    trainings : sequence of AnalyzedTraining
    pieces : Pieces
        What is there is not computed again.
    options : CompareOptions
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    list of list of MeasuredMatrix
        For each training those of its ``records()``.
    """
    todo: dict[str, list[int]] = {}
    for number, one in enumerate(trainings):
        for record in one.records():
            todo.setdefault(record.store_key, []).append(number)
    shapes = {matrix: trainings[numbers[0]].changes[matrix].shape for matrix, numbers in todo.items()}
    sizes = {matrix: work_of(shapes[matrix]) * len(numbers) for matrix, numbers in todo.items()}
    found: list[list[MeasuredMatrix]] = [[] for _ in trainings]
    headway = Headway(len(todo), sum(sizes.values()), progress)
    for matrix, numbers in todo.items():
        rows = _measure_matrix(matrix, [trainings[number] for number in numbers], pieces, options)
        for number, row in zip(numbers, rows, strict=True):
            found[number].append(row)
        headway.add(work=sizes[matrix], weights=math.prod(shapes[matrix]))
    return found


def _measure_matrix(
    matrix: str, trainings: Sequence[AnalyzedTraining], pieces: Pieces, options: CompareOptions
) -> list[MeasuredMatrix]:
    """Measure one matrix of the trainings that changed it, those that are missing; W is decomposed for these alone."""
    base: _Base | None = None
    rows = []
    for one in trainings:
        key = str(one.piece(matrix, options))
        row = cast("MeasuredMatrix | None", pieces.row(key))
        if row is None:
            base = base or _Base(trainings[0].changes[matrix], intruders=options.intruders)
            row = _measure(one.run, one.changes[matrix], base)
            pieces.put(key, dict(row), {})
        rows.append(row)
    return rows


class _Base:
    """W of one matrix, with all of its left singular vectors where intruders are looked for."""

    def __init__(self, change: Change, *, intruders: bool) -> None:
        self.weight = change.weight()
        self.left = torch.linalg.svd(self.weight, full_matrices=False).U if intruders else None


def _measure(run: Run, change: Change, base: _Base) -> MeasuredMatrix:
    spectrum = run.spectrum(str(change.key))
    assert spectrum.left is not None
    assert spectrum.right is not None
    rank = spectrum.left.shape[1]
    norm = float(spectrum.singular_values[:rank].norm())  # of those directions alone, or more of them would weigh less
    device = base.weight.device
    found = amplify(base.weight, spectrum.left.to(device), spectrum.right.to(device), norm=norm)
    row = MeasuredMatrix(amplification=found.factor, amplification_null=norm / found.null if found.null else math.inf)
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
