"""Is an adapter as good as it claims: its files read back, and held against ΔW from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaspec.delta import DenseDelta
from deltaspec.engine.local import resolve_devices
from deltaspec.engine.local import run as run_engine
from deltaspec.errors import NumericalError, PairingError
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import open_plain
from deltaspec.io.peft_names import left_out
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.svd import decompose
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter
from deltaspec.pairing.plan import refuse_shapes
from deltaspec.types import AdapterIndex, LowRankDelta, LowRankSource, MatrixSource, Step, WeightPair
from deltaspec.workflows.analysis.analyze import make_plan
from deltaspec.workflows.shared.non_finite import locate
from deltaspec.workflows.verification.beside_factors import check_claimed, check_rest, list_tuned
from deltaspec.workflows.verification.match_factors import (
    Check,
    check_twins,
    make_layout,
    match,
    read_claims,
    read_factors,
)

SLACK, FLOOR = 1e-6, 1e-9  # relative and absolute: both sums are in float64, over the same stored factors


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found; ``worse`` names what is not as good as ``deltaspec.json`` claims, ``missing`` what is not there.

    ``rows`` has each matrix, ``rest`` each bias and each tensor stored whole, with ``right`` where it is exactly the
    fine-tune's.
    """

    rows: tuple[dict[str, Any], ...]
    rest: tuple[dict[str, Any], ...]
    totals: dict[str, Any]
    worse: tuple[str, ...]
    missing: tuple[str, ...]
    claims: bool


def verify(
    base: str | Path,
    tuned: str | Path,
    adapter: str | Path,
    *,
    options: AnalyzeOptions | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Verification:
    """Recompute the error of every module's stored factors against ΔW, and the least possible at their rank.

    Parameters
    ----------
    base, tuned : str or Path
        The checkpoints that the adapter was extracted from.
    adapter : str or Path
        Any LoRA folder; where it holds ``deltaspec.json`` its claims are checked.
    options : AnalyzeOptions, optional
        device, workers, memory and vocab are used.
    progress : callable, optional
        Called with a Step after each matrix.

    Raises
    ------
    DeltaspecError
        If something cannot be read, or the adapter belongs to another base.
    """
    options = options or AnalyzeOptions()
    plan, first, second = make_plan(base, tuned, options)
    index = open_plain(adapter)
    if isinstance(first, AdapterIndex) or not isinstance(index, AdapterIndex):
        message = (
            f"Expected a base, a tuned model and a LoRA adapter, found {first.ref} and {index.ref}: check the order."
        )
        raise PairingError(message)
    claims = read_claims(index, second)
    adapted = pair_adapter(first, index, options)
    refuse_shapes(adapted.heads, vocabulary=False)
    found = match(plan, adapted, first, claims=claims)
    rows = _run(found.checks, options, progress)
    layout = make_layout(plan, first)
    tensors = list_tuned(plan, second, layout)
    rest = check_rest(plan, adapted, tensors)
    if claims:
        found.worse[:0] = [row["matrix"] for row in rows if row["worse"] and row["matrix"] not in found.missing]
        worse, missing = check_twins(plan, index, first, claims=claims)
        more, absent = check_claimed(claims, plan, tensors, layout=layout, adapter=index)
        known = {row["tensor"] for row in rest}
        rest += [row for row in more if row["tensor"] not in known]
        found.worse += worse + [row["tensor"] for row in rest if not row["right"]]
        found.missing += missing + absent + left_out(index)
    return Verification(
        tuple(rows), tuple(rest), _totals(rows), tuple(found.worse), tuple(found.missing), claims is not None
    )


def _run(checks: list[Check], options: AnalyzeOptions, progress: Callable[[Step], None] | None) -> list[dict[str, Any]]:
    """Check every matrix, and return the rows in the order of the checks."""
    rows: list[dict[str, Any]] = []
    devices = resolve_devices(options.device, options.workers)
    total = sum(math.prod(check.pair.shape) for check in checks)
    done = 0
    for outcome in run_engine(checks, _check, devices=devices, cost=_memory, budget=options.memory or _budget(checks)):
        if outcome.value is None:
            raise outcome.failure or RuntimeError(str(outcome.item.pair.key))
        rows.append(outcome.value)
        done += math.prod(outcome.item.pair.shape)
        if progress:
            progress(Step(len(rows), len(checks), 0, done, total, done))
    order = {str(check.pair.key): place for place, check in enumerate(checks)}
    return sorted(rows, key=lambda row: order[row["matrix"]])


def _memory(check: Check) -> int:
    side, long = min(check.pair.shape), max(check.pair.shape)
    return 16 * side * side + 4 * side * long + (32 << 20)


def _budget(checks: list[Check]) -> int:
    return 2 * max(map(_memory, checks), default=0) + (48 << 20)


def _check(check: Check, device: torch.device) -> dict[str, Any]:
    """Recompute one matrix: the error element by element in float64, the optimum from all singular values."""
    pair, factors = check.pair, read_factors(check)
    factors = LowRankDelta(factors.lora_A.to(device), factors.lora_B.to(device))
    own = svd_of_product(factors.lora_B, factors.lora_A)[1]
    rank = int((own > own[:1] * max(pair.shape) * torch.finfo(torch.float64).eps).sum()) if own.numel() else 0
    try:
        energy, lost, values = _measure(pair, factors, device)
    except NumericalError as cause:
        raise locate(pair, str(pair.key), cause) from cause
    error = math.sqrt(lost / energy) if energy else (0.0 if not lost else math.inf)
    optimum = math.sqrt(float(values[rank:].square().sum()) / energy) if energy else 0.0
    worse = check.stray or (check.claimed is not None and not error <= check.claimed * (1 + SLACK) + FLOOR)
    return {
        "matrix": str(pair.key),
        "role": pair.key.role,
        "depth": pair.key.depth,
        "rank": rank,
        "error": error,
        "optimum": optimum,
        "claimed": check.claimed,
        "energy": energy,
        "residual": lost,
        "worse": worse,
    }


def _measure(pair: WeightPair, factors: LowRankDelta, device: torch.device) -> tuple[float, float, torch.Tensor]:
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


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    energy = sum(row["energy"] for row in rows)
    lost, best = sum(row["residual"] for row in rows), sum(row["energy"] * row["optimum"] ** 2 for row in rows)
    return {
        "matrices": len(rows),
        "error": math.sqrt(lost / energy) if energy else math.inf if lost else 0.0,
        "optimum": math.sqrt(best / energy) if energy else 0.0,
    }
