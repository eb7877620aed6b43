"""Two checkpoints → a run directory of spectra and metrics."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaspec.engine.local import resolve_devices
from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError, PairingError, RunError
from deltaspec.io.open import identify_source, open_source
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter, pair_adapters
from deltaspec.pairing.dense import pair_checkpoints
from deltaspec.pairing.plan import Plan, refuse_empty
from deltaspec.store.run import Run
from deltaspec.types import AdapterIndex, Checkpoint, LowRankSource
from deltaspec.workflows.matrix import Task, analyze_matrix, memory_of
from deltaspec.workflows.vectors import compare_vectors

Source = Checkpoint | AdapterIndex


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is; ``work`` is what time is estimated from, in multiply-adds."""

    done: int
    total: int
    failed: int
    work_done: int
    work_total: int
    weights_done: int


def make_plan(base: str | Path, tuned: str | Path, options: AnalyzeOptions) -> tuple[Plan, Source, Source]:
    """Open both sides and pair them; reads headers alone (and embeddings, to see whether they are tied).

    Parameters
    ----------
    base, tuned : str or Path
        A folder, a file, or a hub id with @revision; an adapter folder on the tuned side or on both.
    options : AnalyzeOptions

    Raises
    ------
    CheckpointError, PairingError
        If a side cannot be read, or the two do not belong together.
    """
    first, second = open_source(base), open_source(tuned)
    if isinstance(first, AdapterIndex):
        if isinstance(second, Checkpoint):
            message = f"The base {first.ref} is an adapter and {second.ref} a full checkpoint: swap the two arguments."
            raise PairingError(message)
        plan = pair_adapters(first, second, options)
    elif isinstance(second, AdapterIndex):
        plan = pair_adapter(first, second, options)
    else:
        plan = pair_checkpoints(first, second, options)
    refuse_empty(plan, first, second)
    return plan, first, second


def analyze(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    options: AnalyzeOptions | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Run:
    """Decompose the change of every weight matrix between two checkpoints, and store what it says.

    Parameters
    ----------
    base, tuned : str or Path
        A folder, a file, or a hub id with @revision; an adapter folder on the tuned side or on both.
    out : str or Path, optional
        The run directory; by default one under ``runs`` named after both sides. An unfinished one goes on where it
        stopped, a finished one is returned as it is.
    options : AnalyzeOptions, optional
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    Run
        With one record for each matrix and spectrum; matrices that failed are in ``run.failures``.

    Raises
    ------
    DeltaspecError
        If a side cannot be read, the two do not pair, or the run directory belongs to something else.
    """
    options = options or AnalyzeOptions()
    devices = resolve_devices(options.device, options.workers)
    plan, first, second = make_plan(base, tuned, options)
    tasks = _make_tasks(plan, options)
    manifest = _manifest(plan, first, second, options, tasks)
    run = Run.create_or_resume(out or default_path(manifest), manifest)
    try:
        compare_vectors(plan, run)
        _fill(run, tasks, options, devices=devices, progress=progress)
    except OSError as cause:
        message = (
            f"The run directory {run.path} cannot be written ({cause.strerror}): free space or rights, then run again."
        )
        raise RunError(message) from cause
    return Run.load(run.path)


def default_path(manifest: dict[str, Any]) -> Path:
    """Name a run directory after both sides, with a hash of contents and options, so that two never collide."""
    names = [str(manifest[side]["ref"]).rstrip("/").split("/")[-1] or "model" for side in ("base", "tuned")]
    identity = [manifest["base"]["files"], manifest["tuned"]["files"], manifest["options"]]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{names[0]}--{names[1]}-{digest}"


def _manifest(plan: Plan, base: Source, tuned: Source, options: AnalyzeOptions, tasks: list[Task]) -> dict[str, Any]:
    versions = {name: version(name) for name in ("deltaspec", "torch", "numpy", "safetensors")}
    return {
        "base": identify_source(base),
        "tuned": identify_source(tuned),
        "options": options.identity(),
        "deltaspec": versions["deltaspec"],
        "versions": {**versions, "python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "family": plan.family,
        "notes": plan.notes,
        "skipped": plan.skipped,
        "planned": [task.store_key for task in tasks],
    }


def _make_tasks(plan: Plan, options: AnalyzeOptions) -> list[Task]:
    """One task for each pair and spectrum; a side that is stored as factors has no spectrum of its own."""
    tasks = {}
    for pair in plan.pairs:
        for of in options.spectra:
            task = Task(pair, of)
            if of != "delta" and isinstance(pair.base if of == "base" else pair.tuned, LowRankSource):
                plan.skip(task.store_key, "stored as factors alone: analyse the merged checkpoint for it")
            elif task.store_key in tasks:
                message = f"Two matrices would be stored as '{task.store_key}': leave one out with --exclude."
                raise PairingError(message)
            else:
                tasks[task.store_key] = task
    return list(tasks.values())


def _fill(
    run: Run,
    tasks: list[Task],
    options: AnalyzeOptions,
    *,
    devices: list[torch.device],
    progress: Callable[[Step], None] | None,
) -> None:
    """Run what is missing, largest first, and store each result as it comes."""
    todo = sorted((t for t in tasks if not run.has(t.pair.key, t.store_key)), key=lambda t: -t.work)
    largest = max((8 * t.pair.shape[0] * t.pair.shape[1] for t in tasks), default=0)
    budget = options.memory or 4 * largest + (48 << 20)
    done = failed = work = weights = 0
    total = sum(task.work for task in todo)

    def report() -> None:
        if progress:
            progress(Step(done, len(todo), failed, work, total, weights))

    report()
    outcomes = run_engine(
        todo,
        lambda task, device: analyze_matrix(task, options, device),
        devices=devices,
        cost=partial(memory_of, options=options),
        budget=budget,
    )
    for outcome in outcomes:
        task = outcome.item
        if outcome.value is None:
            run.put_failure(task.pair.key, task.store_key, _sentence(task, outcome.failure))
            failed += 1
        else:
            run.put(*outcome.value)
        done, work, weights = done + 1, work + task.work, weights + int(np.prod(task.pair.shape))
        report()


def _sentence(task: Task, failure: Exception | None) -> str:
    """Say why a matrix has no result."""
    if isinstance(failure, DeltaspecError):
        return str(failure)
    return f"'{task.store_key}' failed unexpectedly ({type(failure).__name__}: {failure}): please report it."
