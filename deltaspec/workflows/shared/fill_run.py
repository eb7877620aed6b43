"""Many matrices → records in a run: what is missing is computed, largest first, and stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError
from deltaspec.store.run import Run
from deltaspec.types import MatrixKey, MatrixRecord, Spectrum
from deltaspec.workflows.shared.workers import Headway, Workers

Norms = dict[str, float]  # of the base's matrices, by key: the same for every model that is compared with it


class Item(Protocol):
    """One decomposition: of which matrix, under which name its record is stored, and what it costs."""

    @property
    def key(self) -> MatrixKey:
        """Its matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    @property
    def store_key(self) -> str:
        """The name of its record in the run; see MatrixRecord.store_key."""

    @property
    def work(self) -> int:
        """Multiply-adds up to a constant."""


T = TypeVar("T", bound=Item)


def work_of(shape: tuple[int, int]) -> int:
    """Multiply-adds of a decomposition up to a constant: long · side², as the Gram matrix costs."""
    return max(shape) * min(shape) ** 2


def fill_run(
    run: Run,
    tasks: Sequence[T],
    compute: Callable[[T, torch.device], tuple[MatrixRecord, Spectrum]],
    *,
    cost: Callable[[T], int],
    workers: Workers,
) -> None:
    """Run what is missing, largest first, and store each result as it comes; failures are stored as their sentence.

    Parameters
    ----------
    run : Run
    tasks : sequence of Item
    compute : callable
        From a task and a device to its record and spectrum.
    cost : callable
        Bytes that a task needs while in flight.
    workers : Workers
        Its ``progress`` is called before the first matrix too.
    """
    todo = sorted((t for t in tasks if not run.has(t.key, t.store_key)), key=lambda t: -t.work)
    largest = max((8 * t.shape[0] * t.shape[1] for t in tasks), default=0)
    budget = workers.memory or 4 * largest + (48 << 20)
    headway = Headway(len(todo), sum(task.work for task in todo), workers.progress)
    headway.tell()
    for outcome in run_engine(todo, compute, devices=workers.devices, cost=cost, budget=budget):
        task = outcome.item
        if outcome.value is None:
            run.put_failure(task.key, task.store_key, _sentence(task, outcome.failure))
        else:
            run.put(*outcome.value)
        headway.add(work=task.work, weights=task.shape[0] * task.shape[1], failed=outcome.value is None)


def _sentence(task: Item, failure: Exception | None) -> str:
    """Say why a matrix has no result."""
    if isinstance(failure, DeltaspecError):
        return str(failure)
    return f"'{task.store_key}' failed unexpectedly ({type(failure).__name__}: {failure}): please report it."
