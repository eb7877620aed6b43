"""Many matrices → records in a run: what is missing is computed, largest first, and stored as it comes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError, RunError
from deltaspec.options import AnalyzeOptions
from deltaspec.store.run import Run
from deltaspec.types import MatrixKey, MatrixRecord, Spectrum

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


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is; ``work`` is what time is estimated from, in multiply-adds."""

    done: int
    total: int
    failed: int
    work_done: int
    work_total: int
    weights_done: int


def work_of(shape: tuple[int, int]) -> int:
    """Multiply-adds of a decomposition up to a constant: long · side², as the Gram matrix costs."""
    return max(shape) * min(shape) ** 2


def describe_environment() -> dict[str, Any]:
    """Say which versions and machine computed a run, as its manifest does."""
    versions = {name: version(name) for name in ("deltaspec", "torch", "numpy", "safetensors")}
    return {
        "deltaspec": versions["deltaspec"],
        "versions": {**versions, "python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
    }


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


def unwritable(folder: Path, cause: OSError) -> RunError:
    """Say that a run directory cannot be written."""
    message = f"The run directory {folder} cannot be written ({cause.strerror}): free space or rights, then run again."
    return RunError(message)


def default_path(manifest: dict[str, Any]) -> Path:
    """Name a run directory after both sides, with a hash of contents and options, so that two never collide."""
    names = [str(manifest[side]["ref"]).rstrip("/").split("/")[-1] or "model" for side in ("base", "tuned")]
    identity = [manifest["base"]["files"], manifest["tuned"]["files"], manifest["options"]]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{names[0]}--{names[1]}-{digest}"
