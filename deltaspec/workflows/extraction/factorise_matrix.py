"""One matrix from its stored pair to its factors and their errors: what ``extract`` runs for each item of its plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltaspec.delta import DenseDelta, energy_of
from deltaspec.errors import NumericalError
from deltaspec.extraction.factor_errors import optimum, product_error, stored_errors
from deltaspec.extraction.factors import Factors, balance, cast_factors
from deltaspec.extraction.ranks import RankChoice
from deltaspec.extraction.whiten import balance_weighted, truncate_weighted, weighted_errors
from deltaspec.io.matrix import read_low_rank
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.truncated import truncate, truncate_product
from deltaspec.options import RankOptions
from deltaspec.spectra.noise import edge_of_rounding
from deltaspec.store.formats.adapter import Approximation
from deltaspec.store.formats.piece import FactorisedRow
from deltaspec.types import LowRankDelta, LowRankSource, MatrixSource, Truncation, WeightPair
from deltaspec.workflows.shared.non_finite import locate

WHOLE = 4 << 30  # bytes of ΔW in float32 that may be in memory at once; beyond that it is only streamed


@dataclass(frozen=True, slots=True)
class Job:
    """One factorization: a pair, and what its options say for it.

    ``labels`` maps each adapter to be written to its policy's amount, or to this matrix's rank where ``given``.
    ``moments`` returns S of the module's inputs, (d_in, d_in), where there are any.
    """

    pair: WeightPair
    labels: Mapping[str, float]
    given: bool
    dtype: str
    moments: Callable[[], Tensor | None] | None = None

    @property
    def key(self) -> str:
        """The name of its piece."""
        return str(self.pair.key)

    @property
    def wanted(self) -> dict[str, Any]:
        """What its piece answers; one that answered something else is done again."""
        return {**self.labels, "given": self.given, "dtype": self.dtype}

    @property
    def work(self) -> int:
        """Elements: what time is estimated from."""
        return math.prod(self.pair.shape)


def memory_of(job: Job) -> int:
    """Bytes that a job needs while in flight: ΔW in float32, blocks and a basis; with moments S thrice and ΔW·S^½."""
    side, long = min(job.pair.shape), max(job.pair.shape)
    weighted = 24 * job.pair.shape[1] ** 2 + 8 * side * long if job.moments else 0
    return min(4 * side * long, WHOLE) + 16 * side * side + weighted + (24 << 20)


def name_factors(label: str) -> tuple[str, str]:
    """Name the factors of one adapter in a matrix's piece: lora_A and lora_B."""
    return f"{label}.lora_A", f"{label}.lora_B"


def factorise(job: Job, ranks: RankOptions, device: torch.device) -> tuple[FactorisedRow, dict[str, Tensor]]:
    """Truncate one matrix, and measure the factors that will be stored.

    Returns
    -------
    row : FactorisedRow
    tensors : dict
        Both factors for each label, in the adapter's dtype, under the names of ``name_factors``.

    Raises
    ------
    NumericalError, CheckpointError
        If the matrix holds NaN or infinity, does not converge, or cannot be read.
    """
    start = time.perf_counter()
    try:
        if isinstance(job.pair.tuned, LowRankSource):
            made = _of_factors(job, ranks, device)
        else:
            made = _of_delta(job, ranks, device)
    except NumericalError as cause:
        raise locate(job.pair, job.key, cause) from cause
    key = job.pair.key
    row: FactorisedRow = {
        "matrix": job.key,
        "tensor": key.tensor,
        "part": key.part,
        "role": key.role,
        "depth": key.depth,
        "expert": key.expert,
        "shape": list(job.pair.shape),
        "energy": made.energy,
        "method": made.method,
        "excess": made.excess,
        "results": made.results,
        "base_energy": made.base_energy,
        "seconds": time.perf_counter() - start,
    }
    if made.rounding_share is not None:
        row["rounding_share"] = made.rounding_share
    return row, {n: t for label, ab in made.factors.items() for n, t in zip(name_factors(label), ab, strict=True)}


@dataclass(frozen=True, slots=True)
class _Made:
    """Factors by label, and what is said of them; fields as of FactorisedRow."""

    energy: float
    method: str
    excess: float
    results: dict[str, Approximation]
    factors: dict[str, Factors]
    base_energy: float | None = None
    rounding_share: float | None = None


def _of_delta(job: Job, ranks: RankOptions, device: torch.device) -> _Made:
    pair = job.pair
    assert isinstance(pair.base, MatrixSource)
    assert isinstance(pair.tuned, MatrixSource)
    delta = DenseDelta(pair.base, pair.tuned, device=device)
    choice = RankChoice(job.labels, job.given, ranks, min(pair.shape), lambda: edge_of_rounding(delta.rounding))
    moments = job.moments() if job.moments else None
    made = _plain(job, choice, delta) if moments is None else _weighted(job, choice, delta, moments)
    predicted = delta.rounding.ulp_energy / 12
    share = min(1.0, predicted / made.energy) if made.energy else 0.0
    return replace(made, base_energy=delta.base_energy, rounding_share=share)


def _plain(job: Job, choice: RankChoice, delta: DenseDelta) -> _Made:
    """Minimise ‖ΔW - BA‖ itself."""
    shape, device = job.pair.shape, delta.device
    found = truncate(Streamed(delta.blocks, shape, device, delta.hold), rank=choice.largest, memory=WHOLE)
    chosen = choice.settle(found)
    pairs = {label: cast_factors(balance(found, rank), job.dtype) for label, rank in chosen.items()}
    errors = stored_errors(delta.blocks, shape, list(pairs.values()), device=device, energy=found.energy)
    results = _results(found, chosen, dict(zip(pairs, errors, strict=True)))
    return _Made(found.energy, found.method, found.excess, results, pairs)


def _weighted(job: Job, choice: RankChoice, delta: DenseDelta, moments: Tensor) -> _Made:
    """Minimise the error that inputs with these second moments see; the plain error and its optimum stand beside."""
    shape, device = job.pair.shape, delta.device
    found = truncate_weighted(delta.blocks, shape, moments, device=device, rank=choice.largest)
    chosen = choice.settle(found.truncation)
    pairs = {label: cast_factors(balance_weighted(found, rank), job.dtype) for label, rank in chosen.items()}
    factors = list(pairs.values())
    errors = stored_errors(delta.blocks, shape, factors, device=device, energy=found.energy)
    seen = weighted_errors(found.weighted, factors, device=device, energy=found.truncation.energy)
    plain = truncate(Streamed(delta.blocks, shape, device), rank=max(chosen.values()), memory=WHOLE)
    results = _results(plain, chosen, dict(zip(pairs, errors, strict=True)))
    for (label, result), error in zip(results.items(), seen, strict=True):
        result["weighted_error"], result["weighted_optimum"] = error, optimum(found.truncation, chosen[label])
    return _Made(plain.energy, f"inputs+{found.truncation.method}", found.truncation.excess, results, pairs)


def _of_factors(job: Job, ranks: RankOptions, device: torch.device) -> _Made:
    """Truncate stored factors through QR, never formed densely."""
    assert isinstance(job.pair.tuned, LowRankSource)
    delta, base = read_low_rank(job.pair.tuned), job.pair.base
    delta = LowRankDelta(delta.lora_A.to(device), delta.lora_B.to(device))
    choice = RankChoice(job.labels, job.given, ranks, min(*job.pair.shape, delta.lora_A.shape[0]))
    found = truncate_product(delta.lora_B, delta.lora_A, rank=choice.largest)
    chosen = choice.settle(found)
    pairs = {label: cast_factors(balance(found, rank), job.dtype) for label, rank in chosen.items()}
    errors = {label: product_error(delta, factors, energy=found.energy) for label, factors in pairs.items()}
    base_energy = energy_of(base, device=device) if isinstance(base, MatrixSource) else None
    return _Made(found.energy, found.method, found.excess, _results(found, chosen, errors), pairs, base_energy)


def _results(found: Truncation, ranks: dict[str, int], errors: dict[str, float]) -> dict[str, Approximation]:
    return {
        label: {"rank": rank, "error": errors[label], "optimum": optimum(found, rank)} for label, rank in ranks.items()
    }
