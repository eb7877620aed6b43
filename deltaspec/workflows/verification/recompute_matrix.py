"""One matrix's stored factors against its ΔW, from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.delta import DenseDelta
from deltaspec.errors import NumericalError
from deltaspec.io.matrix import read_low_rank
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.svd import decompose
from deltaspec.types import LowRankDelta, LowRankSource, MatrixSource, WeightPair
from deltaspec.workflows.shared.non_finite import locate
from deltaspec.workflows.verification.match_factors import Check, read_factors

SLACK, FLOOR = 1e-6, 1e-9  # relative and absolute: both sums are in float64, over the same stored factors


@dataclass(frozen=True, slots=True)
class CheckedMatrix:
    """One matrix, recomputed.

    ``rank`` is that of the stored product; ``error`` = ‖ΔW - BA‖/‖ΔW‖ and ``optimum`` the least at this rank;
    ``claimed`` is the error that the report claims, None where it claims nothing. ``energy`` = ‖ΔW‖² and ``residual``
    = ‖ΔW - BA‖², squared units of the weights. ``worse``: the error is above the claim, or there is no claim for it.
    """

    matrix: str
    role: str
    depth: int | None
    rank: int
    error: float
    optimum: float
    claimed: float | None
    energy: float
    residual: float
    worse: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """All matrices as one: how many, ‖ΔW - BA‖/‖ΔW‖ over all of them, and the least possible at their ranks."""

    matrices: int
    error: float
    optimum: float


def recompute_matrix(check: Check, device: torch.device) -> CheckedMatrix:
    """Recompute one matrix: the error element by element in float64, the optimum from all singular values.

    Raises
    ------
    NumericalError, CheckpointError
        If the matrix holds NaN or infinity, or cannot be read.
    """
    pair, factors = check.pair, read_factors(check)
    factors = LowRankDelta(factors.lora_A.to(device), factors.lora_B.to(device))
    if not bool(torch.isfinite(factors.lora_A).all() and torch.isfinite(factors.lora_B).all()):
        message = f"Cannot verify '{pair.key}': its factors hold NaN or infinity; extract or train the adapter again."
        raise NumericalError(message)
    own = svd_of_product(factors.lora_B, factors.lora_A)[1]
    rank = int((own > own[:1] * max(pair.shape) * torch.finfo(torch.float64).eps).sum()) if own.numel() else 0
    try:
        energy, lost, values = _measure(pair, factors, device)
    except NumericalError as cause:
        raise locate(pair, str(pair.key), cause, exclude=False) from cause
    error = math.sqrt(lost / energy) if energy else (0.0 if not lost else math.inf)
    return CheckedMatrix(
        matrix=str(pair.key),
        role=pair.key.role,
        depth=pair.key.depth,
        rank=rank,
        error=error,
        optimum=math.sqrt(float(values[rank:].square().sum()) / energy) if energy else 0.0,
        claimed=check.claimed,
        energy=energy,
        residual=lost,
        worse=check.stray or (check.claimed is not None and not error <= check.claimed * (1 + SLACK) + FLOOR),
    )


def _measure(pair: WeightPair, factors: LowRankDelta, device: torch.device) -> tuple[float, float, Tensor]:
    """Return ‖ΔW‖², ‖ΔW - BA‖² and all singular values of ΔW (‖ΔW‖ alone where there are no factors)."""
    if isinstance(pair.tuned, LowRankSource):
        tuned = read_low_rank(pair.tuned)
        values = svd_of_product(tuned.lora_B, tuned.lora_A)[1]
        rest = svd_of_product(
            torch.cat([tuned.lora_B, -factors.lora_B.cpu()], dim=1), torch.cat([tuned.lora_A, factors.lora_A.cpu()])
        )[1]
        return float(values.square().sum()), float(rest.square().sum()), values
    assert isinstance(pair.base, MatrixSource)
    delta = DenseDelta(pair.base, pair.tuned, device=device)
    tall, place = pair.shape[0] >= pair.shape[1], 0
    beyond = svd_of_product(factors.lora_B[pair.shape[0] :], factors.lora_A)[1]
    energy, lost, lora_B = 0.0, float(beyond.square().sum()), factors.lora_B[: pair.shape[0]]
    for block in delta.blocks():
        span = slice(place, place + (block.shape[0] if tall else block.shape[1]))
        place = span.stop
        product = lora_B[span] @ factors.lora_A if tall else lora_B @ factors.lora_A[:, span]
        energy += float(block.square().sum())
        lost += float((block - product).square().sum())
    if not factors.lora_A.shape[0]:
        return energy, lost, torch.tensor([math.sqrt(energy)], dtype=torch.float64)
    return energy, lost, decompose(delta.blocks, pair.shape, device=device)[0].singular_values


def memory_of(check: Check) -> int:
    """Bytes that a check needs while in flight: two Gram matrices, blocks, and what the decomposition takes."""
    side, long = min(check.pair.shape), max(check.pair.shape)
    return 16 * side * side + 4 * side * long + (32 << 20)


def total(rows: Sequence[CheckedMatrix]) -> Totals:
    """Sum up all matrices.

    Examples
    --------
    >>> row = CheckedMatrix("q", "q_proj", 0, 1, 0.6, 0.0, None, energy=4.0, residual=1.44, worse=False)
    >>> total([row, row])
    Totals(matrices=2, error=0.6, optimum=0.0)
    """
    energy = sum(row.energy for row in rows)
    lost, best = sum(row.residual for row in rows), sum(row.energy * row.optimum**2 for row in rows)
    error = math.sqrt(lost / energy) if energy else math.inf if lost else 0.0
    return Totals(len(rows), error, math.sqrt(best / energy) if energy else 0.0)
