"""Every matrix factorised, and the adapters written from them: what extracting and summing have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deltaspec.io.staging import Staging
from deltaspec.store.formats.adapter import AdapterReport
from deltaspec.store.formats.piece import FactorisedRow
from deltaspec.store.pieces import Pieces
from deltaspec.workflows.extraction.adapter_folder import write_adapters
from deltaspec.workflows.extraction.budget_ranks import spend
from deltaspec.workflows.extraction.factorise_matrix import Job, factorise
from deltaspec.workflows.extraction.fill_pieces import fill_pieces
from deltaspec.workflows.extraction.nouns import Assembly, Extraction, Finished, Rest, Spending
from deltaspec.workflows.shared.workers import Workers


def build_adapters(
    extraction: Extraction, workers: Workers, staging: Staging, measure: Callable[[Finished], Rest]
) -> dict[str, AdapterReport]:
    """Factorise every matrix that is not done yet, write the adapters and commit them; returns their reports by label.

    Parameters
    ----------
    extraction : Extraction
    workers : Workers
    staging : Staging
        Entered; it keeps what is finished.
    measure : callable
        Finished rows → what goes beside the factors; it refuses where there is nothing to write.
    """
    sources, options = extraction.sources, extraction.options
    spending = spend(sources, options, workers, Pieces(staging.path / "spectra"))
    pieces = Pieces(staging.path / "factors")

    def compute(job: Job, device: torch.device) -> tuple[FactorisedRow, dict[str, Tensor]]:
        return factorise(job, options.ranks, device)

    rows = fill_pieces(_list_jobs(extraction, spending), pieces, compute, workers)
    assembly = Assembly(extraction, rows, pieces, measure(rows), spending)
    reports = write_adapters(assembly, staging.path / "built")
    staging.commit(staging.path / "built")
    return reports


def _list_jobs(extraction: Extraction, spending: Spending | None) -> list[Job]:
    """One job for each matrix that gets factors."""
    sources, moments, jobs = extraction.sources, extraction.moments, []
    amounts = extraction.options.ranks.labels()
    for module in sources.modules:
        for pair in module.pairs:
            labels = spending.ranks[str(pair.key)] if spending else amounts
            weigh = partial(moments.get, module.name) if moments and module.kind in ("linear", "conv1d") else None
            jobs.append(Job(pair, labels, spending is not None, sources.dtype, weigh))
    return jobs
