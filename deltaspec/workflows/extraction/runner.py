"""Jobs on devices, and pieces of work that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError, NumericalError
from deltaspec.options import ExtractOptions
from deltaspec.store.pieces import Pieces
from deltaspec.types import Step
from deltaspec.workflows.extraction.factorise_matrix import Job, factorise, memory_of


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs jobs on devices, and keeps what is done."""

    options: ExtractOptions
    devices: list[torch.device]
    progress: Callable[[Step], None] | None

    def fill(self, jobs: Sequence[Job], pieces: Pieces, work: Callable[..., Any] | None = None) -> dict[str, Any]:
        """Do the jobs whose pieces are missing, largest first, and return all rows by key.

        Raises
        ------
        NumericalError
            If any job failed; the others are kept.
        """
        function = work or (lambda job, device: factorise(job, self.options.ranks, device))
        rows = {job.key: pieces.row(job.key) or {} for job in jobs}
        wanted = {job.key: {**job.labels, "given": job.given, "dtype": job.dtype} for job in jobs}
        todo = [job for job in jobs if rows[job.key].get("wanted") != wanted[job.key]]
        todo.sort(key=lambda job: -job.work)
        largest = max((memory_of(job) for job in jobs), default=0)
        done = finished = 0
        failed: list[Exception] = []
        total = sum(job.work for job in todo)
        budget = self.options.analysis.memory or 2 * largest + (48 << 20)
        for outcome in run_engine(todo, function, devices=self.devices, cost=memory_of, budget=budget):
            job = outcome.item
            if outcome.value is None:
                failed.append(outcome.failure or RuntimeError(job.key))
            else:
                row, tensors = outcome.value
                rows[job.key] = {**row, "wanted": wanted[job.key]}
                pieces.put(job.key, rows[job.key], tensors)
            done, finished = done + 1, finished + job.work
            if self.progress:
                self.progress(Step(done, len(todo), len(failed), finished, total, finished))
        if failed:
            raise _failure(failed)
        return rows


def _failure(failed: list[Exception]) -> Exception:
    first = next((error for error in failed if not isinstance(error, DeltaspecError)), failed[0])
    if not isinstance(first, DeltaspecError):
        return first
    more = f" ({len(failed) - 1} more matrices failed.)" if len(failed) > 1 else ""
    return NumericalError(f"{first}{more}")
