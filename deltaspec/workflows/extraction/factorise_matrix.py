"""One matrix from its stored pair to its factors and their errors: what ``extract`` runs for each item of its plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaspec.delta import DenseDelta, energy_of
from deltaspec.errors import NumericalError
from deltaspec.extraction.factors import Factors, balance, cast_factors, optimum, product_error, stored_errors
from deltaspec.extraction.ranks import POLICIES, clamp
from deltaspec.extraction.whiten import balance_weighted, truncate_weighted, weighted_errors
from deltaspec.io.matrix import read_low_rank
from deltaspec.linalg.truncated import truncate, truncate_product
from deltaspec.options import RankOptions
from deltaspec.spectra.noise import edge_of_rounding
from deltaspec.types import LowRankDelta, LowRankSource, MatrixSource, Truncation, WeightPair
from deltaspec.workflows.shared.non_finite import locate

WHOLE = 4 << 30  # bytes of ΔW in float32 that may be in memory at once; beyond that it is only streamed


@dataclass(frozen=True, slots=True)
class Job:
    """One factorization: a pair, and what its options say for it.

    ``labels`` maps each adapter to be written to its policy's amount, or to this matrix's rank where ``given``.
    """

    pair: WeightPair
    labels: dict[str, float]
    given: bool
    dtype: str
    moments: Callable[[], Tensor | None] | None = None

    @property
    def key(self) -> str:
        """The name of its piece."""
        return str(self.pair.key)

    @property
    def work(self) -> int:
        """Elements: what time is estimated from."""
        return math.prod(self.pair.shape)


def memory_of(job: Job) -> int:
    """Bytes that a job needs while in flight: ΔW in float32, blocks and a basis; with moments S thrice and ΔW·S^½."""
    side, long = min(job.pair.shape), max(job.pair.shape)
    weighted = 24 * job.pair.shape[1] ** 2 + 8 * side * long if job.moments else 0
    return min(4 * side * long, WHOLE) + 16 * side * side + weighted + (24 << 20)


def factorise(job: Job, ranks: RankOptions, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Truncate one ΔW at every rank asked for, and measure the factors that will be stored.

    Returns
    -------
    row : dict
        rank, error, optimum (and weighted ones) by label, energy, method, excess.
    tensors : dict
        ``{label}.lora_A`` and ``{label}.lora_B``, in the adapter's dtype.

    Raises
    ------
    NumericalError, CheckpointError
        If the matrix holds NaN or infinity, does not converge, or cannot be read.
    """
    start = time.perf_counter()
    try:
        if isinstance(job.pair.tuned, LowRankSource):
            row, pairs = _of_factors(job, ranks, device)
        else:
            row, pairs = _of_delta(job, ranks, device)
    except NumericalError as cause:
        raise locate(job.pair, job.key, cause) from cause
    key = job.pair.key
    place = {"tensor": key.tensor, "part": key.part, "role": key.role, "depth": key.depth, "expert": key.expert}
    row = {"matrix": job.key, **place, "shape": job.pair.shape, **row, "seconds": time.perf_counter() - start}
    names = ("lora_A", "lora_B")
    return row, {f"{label}.{n}": t for label, ab in pairs.items() for n, t in zip(names, ab, strict=True)}


class _Chooser:
    """Each label's rank, at most ``side``: known beforehand, or chosen once all singular values are."""

    def __init__(self, job: Job, ranks: RankOptions, *, side: int, edge: Callable[[], float]) -> None:
        self.job, self.options, self.edge, self.side = job, ranks, edge, side
        self.ranks: dict[str, int] = {}
        if job.given or ranks.policy == "rank":
            self.ranks = {label: self._clamp(int(amount)) for label, amount in job.labels.items()}

    @property
    def rank(self) -> int | Callable[[Tensor], int]:
        """What ``truncate`` wants: a number where one is known."""
        return max(self.ranks.values()) if self.ranks else self._choose

    def settle(self, found: Truncation) -> dict[str, int]:
        """Return the ranks that a truncation really has: none of a zero matrix, for which nothing was chosen."""
        return {label: min(self.ranks.get(label, 0), found.singular_values.numel()) for label in self.job.labels}

    def _clamp(self, rank: int) -> int:
        if self.job.given:
            return min(rank, self.side)
        return clamp(rank, minimum=self.options.minimum, maximum=self.options.maximum, side=self.side)

    def _choose(self, values: Tensor) -> int:
        energy, policy = float(values.square().sum()), POLICIES[self.options.policy]
        for label, amount in self.job.labels.items():
            asked = self.edge() if self.options.policy == "above_rounding" else amount
            rank = policy.function(values, energy, asked) if policy.function and energy else 0
            self.ranks[label] = self._clamp(rank) if energy else 0
        return max(self.ranks.values())


def _of_delta(job: Job, ranks: RankOptions, device: torch.device) -> tuple[dict[str, Any], dict[str, Factors]]:
    pair = job.pair
    assert isinstance(pair.base, MatrixSource)
    assert isinstance(pair.tuned, MatrixSource)
    delta = DenseDelta(pair.base, pair.tuned, device=device)
    chooser = _Chooser(job, ranks, side=min(pair.shape), edge=lambda: edge_of_rounding(delta.rounding))
    moments = job.moments() if job.moments else None
    if moments is None:
        row, pairs = _of_plain(job, chooser, delta, device)
    else:
        row, pairs = _of_weighted(job, chooser, delta, moments, device)
    predicted, energy = delta.rounding.ulp_energy / 12, row["energy"]
    share = min(1.0, predicted / energy) if energy else 0.0
    return {**row, "base_energy": delta.base_energy, "rounding_share": share}, pairs


def _of_plain(
    job: Job, chooser: _Chooser, delta: DenseDelta, device: torch.device
) -> tuple[dict[str, Any], dict[str, Factors]]:
    shape = job.pair.shape
    found = truncate(delta.blocks, shape, device=device, rank=chooser.rank, memory=WHOLE, hold=delta.hold)
    chosen = chooser.settle(found)
    pairs = {label: cast_factors(balance(found, rank), job.dtype) for label, rank in chosen.items()}
    errors = stored_errors(delta.blocks, shape, list(pairs.values()), device=device, energy=found.energy)
    return _row(found, chosen, dict(zip(pairs, errors, strict=True))), pairs


def _of_weighted(
    job: Job, chooser: _Chooser, delta: DenseDelta, moments: Tensor, device: torch.device
) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Minimise the error that inputs with these second moments see; the plain error and its optimum stand beside."""
    shape = job.pair.shape
    found = truncate_weighted(delta.blocks, shape, moments, device=device, rank=chooser.rank)
    chosen = chooser.settle(found.truncation)
    pairs = {label: cast_factors(balance_weighted(found, rank), job.dtype) for label, rank in chosen.items()}
    factors = list(pairs.values())
    errors = stored_errors(delta.blocks, shape, factors, device=device, energy=found.energy)
    seen = weighted_errors(found.weighted, factors, device=device, energy=found.truncation.energy)
    plain = truncate(delta.blocks, shape, device=device, rank=max(chosen.values()), memory=WHOLE)
    row = _row(plain, chosen, dict(zip(pairs, errors, strict=True)))
    for (label, result), error in zip(row["results"].items(), seen, strict=True):
        result |= {"weighted_error": error, "weighted_optimum": optimum(found.truncation, chosen[label])}
    return {**row, "method": f"inputs+{found.truncation.method}", "excess": found.truncation.excess}, pairs


def _of_factors(job: Job, ranks: RankOptions, device: torch.device) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Truncate stored factors through QR, never formed densely."""
    assert isinstance(job.pair.tuned, LowRankSource)
    delta = read_low_rank(job.pair.tuned)
    delta = LowRankDelta(delta.lora_A.to(device), delta.lora_B.to(device))
    chooser = _Chooser(job, ranks, side=min(*job.pair.shape, delta.lora_A.shape[0]), edge=lambda: 0.0)
    found = truncate_product(delta.lora_B, delta.lora_A, rank=chooser.rank)
    chosen = chooser.settle(found)
    pairs = {label: cast_factors(balance(found, rank), job.dtype) for label, rank in chosen.items()}
    errors = {label: product_error(delta, factors, energy=found.energy) for label, factors in pairs.items()}
    row = _row(found, chosen, errors)
    base = job.pair.base
    return {**row, "base_energy": energy_of(base, device=device) if isinstance(base, MatrixSource) else None}, pairs


def _row(found: Truncation, ranks: dict[str, int], errors: dict[str, float]) -> dict[str, Any]:
    results = {
        label: {"rank": rank, "error": errors[label], "optimum": optimum(found, rank)} for label, rank in ranks.items()
    }
    return {"energy": found.energy, "method": found.method, "excess": found.excess, "results": results}
