"""Many matrices → records in a run: what is missing is computed, largest first, and stored as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from deltaspec.engine.local import resolve_devices
from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError
from deltaspec.options import AnalyzeOptions
from deltaspec.store.run import Run
from deltaspec.types import MatrixKey, MatrixRecord, Spectrum
from deltaspec.workflows.shared.workers import Headway, OnStep


class Item(Protocol):
    """One decomposition: of which matrix, under which name its record is stored, and what it costs."""

    @property
    def key(self) -> MatrixKey:
        """Its matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    @property
    def spectrum_of(self) -> str:
        """Which of delta, base and tuned."""

    @property
    def store_key(self) -> str:
        """The name of its record in the run; see MatrixRecord.store_key."""

    @property
    def work(self) -> int:
        """Multiply-adds up to a constant."""


T = TypeVar("T", bound=Item)


def work_of(shape: tuple[int, int]) -> int:
    """Multiply-adds of a decomposition up to a constant: long · side², as the Gram matrix costs.

    Examples
    --------
    >>> work_of((30, 10)) == work_of((10, 30)) == 3000
    True
    """
    return max(shape) * min(shape) ** 2


@dataclass(frozen=True)
class Execution:
    """How an analysis is carried out.

    Parameters
    ----------
    options : AnalyzeOptions
        Of which ``memory`` is the budget, and ``device`` and ``workers`` say where.
    progress : callable, optional
        Called with a Step before the first matrix and after each.
    sibling : Run, optional
        Of the same base with the same options: spectra of the base itself are taken from it.

    Attributes
    ----------
    devices : list of torch.device
        One for each worker.

    Raises
    ------
    OptionError
        If this machine has no such device.
    """

    options: AnalyzeOptions
    progress: OnStep | None = None
    sibling: Run | None = None
    devices: list[torch.device] = field(init=False)

    def __post_init__(self) -> None:
        """Find the devices."""
        object.__setattr__(self, "devices", resolve_devices(self.options.device, self.options.workers))


def fill_run(
    run: Run,
    tasks: Sequence[T],
    compute: Callable[[T, torch.device], tuple[MatrixRecord, Spectrum]],
    *,
    cost: Callable[[T], int],
    execution: Execution,
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
    execution : Execution
    """
    if execution.sibling:
        run.adopt(execution.sibling, [(task.key, task.store_key) for task in tasks if task.spectrum_of == "base"])
    todo = sorted((t for t in tasks if not run.has(t.key, t.store_key)), key=lambda t: -t.work)
    largest = max((8 * t.shape[0] * t.shape[1] for t in tasks), default=0)
    budget = execution.options.memory or 4 * largest + (48 << 20)
    headway = Headway(len(todo), sum(task.work for task in todo), execution.progress)
    headway.tell()
    for outcome in run_engine(todo, compute, devices=execution.devices, cost=cost, budget=budget):
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
