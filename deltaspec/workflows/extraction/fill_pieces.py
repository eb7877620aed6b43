"""Jobs on devices, each kept as a piece once it is done, so that a killed extraction goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from deltaspec.engine.local import run as run_engine
from deltaspec.errors import DeltaspecError, NumericalError
from deltaspec.store.pieces import Pieces
from deltaspec.workflows.extraction.factorise_matrix import Job, memory_of
from deltaspec.workflows.shared.workers import Headway, Workers

Row = TypeVar("Row", bound=Mapping[str, Any])


def fill_pieces(
    jobs: Sequence[Job],
    pieces: Pieces,
    compute: Callable[[Job, torch.device], tuple[Row, dict[str, Tensor]]],
    workers: Workers,
) -> dict[str, Row]:
    """Do the jobs whose pieces are missing, largest first, and return all rows by key.

    Parameters
    ----------
    jobs : sequence of Job
    pieces : Pieces
        What is done already, and takes what is done now; a piece that answered another wish is done again.
    compute : callable
        From a job and a device to its row, plain data, and its tensors.
    workers : Workers

    Raises
    ------
    NumericalError
        If any job failed; the others are kept.
    """
    rows = {job.key: pieces.row(job.key) or {} for job in jobs}
    todo = [job for job in jobs if rows[job.key].get("wanted") != job.wanted]
    todo.sort(key=lambda job: -job.work)
    budget = workers.memory or 2 * max(map(memory_of, jobs), default=0) + (48 << 20)
    headway = Headway(len(todo), sum(job.work for job in todo), workers.progress)
    failed: list[Exception] = []
    for outcome in run_engine(todo, compute, devices=workers.devices, cost=memory_of, budget=budget):
        job = outcome.item
        if outcome.value is None:
            failed.append(outcome.failure or RuntimeError(job.key))
        else:
            row, tensors = outcome.value
            rows[job.key] = {**row, "wanted": job.wanted}
            pieces.put(job.key, rows[job.key], tensors)
        headway.add(work=job.work, failed=outcome.value is None)
    if failed:
        raise _join(failed)
    return cast("dict[str, Row]", rows)


def _join(failed: list[Exception]) -> Exception:
    """Return the error of the first job that failed, and how many more did; a defect of the program comes first."""
    first = next((error for error in failed if not isinstance(error, DeltaspecError)), failed[0])
    if not isinstance(first, DeltaspecError):
        return first
    more = f" ({len(failed) - 1} more matrices failed.)" if len(failed) > 1 else ""
    return NumericalError(f"{first}{more}")
