"""Many matrices → records in a run: what is missing is computed, largest first, and stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError
from deltaspec.options import AnalyzeOptions
from deltaspec.store.run import Run
from deltaspec.types import MatrixKey, MatrixRecord, Spectrum, Step

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
    options: AnalyzeOptions,
    devices: Sequence[torch.device],
    progress: Callable[[Step], None] | None,
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
    options : AnalyzeOptions
        Of which ``memory`` is the budget.
    devices : sequence of torch.device
        One for each worker.
    progress : callable, optional
        Called with a Step before the first matrix and after each.
    """
    todo = sorted((t for t in tasks if not run.has(t.key, t.store_key)), key=lambda t: -t.work)
    largest = max((8 * t.shape[0] * t.shape[1] for t in tasks), default=0)
    budget = options.memory or 4 * largest + (48 << 20)
    done = failed = work = weights = 0
    total = sum(task.work for task in todo)

    def report() -> None:
        if progress:
            progress(Step(done, len(todo), failed, work, total, weights))

    report()
    for outcome in run_engine(todo, compute, devices=devices, cost=cost, budget=budget):
        task = outcome.item
        if outcome.value is None:
            run.put_failure(task.key, task.store_key, _sentence(task, outcome.failure))
            failed += 1
        else:
            run.put(*outcome.value)
        done, work, weights = done + 1, work + task.work, weights + task.shape[0] * task.shape[1]
        report()


def _sentence(task: Item, failure: Exception | None) -> str:
    """Say why a matrix has no result."""
    if isinstance(failure, DeltaspecError):
        return str(failure)
    return f"'{task.store_key}' failed unexpectedly ({type(failure).__name__}: {failure}): please report it."
