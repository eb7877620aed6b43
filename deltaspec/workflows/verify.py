"""Is an adapter as good as it claims: its files read back, and held against ΔW from scratch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaspec.delta import DenseDelta
from deltaspec.engine.local import resolve_devices
from deltaspec.engine.local import run as run_engine
from deltaspec.errors import CheckpointError, NumericalError, PairingError
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import fingerprint, open_source
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.svd import decompose
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter
from deltaspec.pairing.modules import group_modules
from deltaspec.pairing.plan import Plan
from deltaspec.types import AdapterIndex, Checkpoint, LowRankDelta, LowRankSource, MatrixSource, WeightPair
from deltaspec.workflows.analyze import Source, Step, make_plan
from deltaspec.workflows.finite import locate
from deltaspec.workflows.verify_rest import check_rest

SLACK, FLOOR = 1e-6, 1e-9  # relative and absolute: both sums are in float64, over the same stored factors


@dataclass(frozen=True, slots=True)
class Check:
    """One matrix of both models, the adapter's factors for it, and the error that its report claims."""

    pair: WeightPair
    factors: LowRankSource
    claimed: float | None


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
    index = open_source(adapter)
    if isinstance(first, AdapterIndex) or not isinstance(index, AdapterIndex):
        message = (
            f"Expected a base, a tuned model and a LoRA adapter, found {first.ref} and {index.ref}: check the order."
        )
        raise PairingError(message)
    claims = read_claims(index, second)
    adapted = pair_adapter(first, index, options)
    checks, missing = _match(plan_pairs(plan, first), plan_pairs(adapted, first), claims)
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
    rows.sort(key=lambda row: order[row["matrix"]])
    rest = check_rest(plan, adapted)
    worse = [row["matrix"] for row in rows if row["worse"]]
    worse += [row["tensor"] for row in rest if claims and not row["right"]]
    return Verification(tuple(rows), tuple(rest), _totals(rows), tuple(worse), tuple(missing), bool(claims))


def plan_pairs(plan: Plan, base: Checkpoint) -> dict[str, WeightPair]:
    """Return a plan's pairs by key, with fused matrices whole."""
    modules, _ = group_modules(plan, base, split_fused=False)
    return {str(pair.key): pair for module in modules for pair in module.pairs}


def read_claims(adapter: AdapterIndex, tuned: Source) -> dict[str, dict[str, Any]]:
    """Read what ``deltaspec.json`` says of each matrix; empty where there is none, or it speaks of another model.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    path = adapter.root / "deltaspec.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("tuned", {}).get("files") != fingerprint(tuned):
            return {}
        return {row["matrix"]: {"error": float(row["error"]), "rank": int(row["rank"])} for row in found["matrices"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        message = f"Cannot read the claims in '{path}' ({cause}): extract the adapter again."
        raise CheckpointError(message) from cause


def _match(
    pairs: dict[str, WeightPair], adapted: dict[str, WeightPair], claims: dict[str, dict[str, Any]]
) -> tuple[list[Check], list[str]]:
    """Find each adapted matrix's delta; claims that no factors stand behind are missing."""
    checks = []
    for key, pair in adapted.items():
        delta = pairs.get(key)
        if delta is None or not isinstance(pair.tuned, LowRankSource):
            continue
        claim = claims.get(key)
        checks.append(Check(delta, pair.tuned, claim["error"] if claim else None))
    known = {str(check.pair.key) for check in checks}
    missing = [key for key, claim in claims.items() if claim["rank"] and key not in known]
    return checks, missing


def _memory(check: Check) -> int:
    side, long = min(check.pair.shape), max(check.pair.shape)
    return 16 * side * side + 4 * side * long + (32 << 20)


def _budget(checks: list[Check]) -> int:
    return 2 * max(map(_memory, checks), default=0) + (48 << 20)


def _check(check: Check, device: torch.device) -> dict[str, Any]:
    """Recompute one matrix: the error element by element in float64, the optimum from all singular values."""
    pair, factors = check.pair, read_low_rank(check.factors)
    factors = LowRankDelta(factors.lora_A.to(device), factors.lora_B.to(device))
    own = svd_of_product(factors.lora_B, factors.lora_A)[1]
    rank = int((own > own[:1] * max(pair.shape) * torch.finfo(torch.float64).eps).sum()) if own.numel() else 0
    try:
        energy, lost, values = _measure(pair, factors, device)
    except NumericalError as cause:
        raise locate(pair, str(pair.key), cause) from cause
    error = math.sqrt(lost / energy) if energy else (0.0 if not lost else math.inf)
    optimum = math.sqrt(float(values[rank:].square().sum()) / energy) if energy else 0.0
    worse = check.claimed is not None and not error <= check.claimed * (1 + SLACK) + FLOOR
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
    """Return ‖ΔW‖², ‖ΔW - BA‖² and all singular values of ΔW."""
    if isinstance(pair.tuned, LowRankSource):
        tuned = read_low_rank(pair.tuned)
        values = svd_of_product(tuned.lora_B, tuned.lora_A)[1]
        rest = svd_of_product(
            torch.cat([tuned.lora_B, -factors.lora_B.cpu()], dim=1), torch.cat([tuned.lora_A, factors.lora_A.cpu()])
        )[1]
        return float(values.square().sum()), float(rest.square().sum()), values
    assert isinstance(pair.base, MatrixSource)
    delta = DenseDelta(pair.base, pair.tuned, device=device)
    spectrum, _ = decompose(delta.blocks, pair.shape, device=device)
    tall, place = pair.shape[0] >= pair.shape[1], 0
    energy = lost = 0.0
    for block in delta.blocks():
        span = slice(place, place + (block.shape[0] if tall else block.shape[1]))
        place = span.stop
        product = factors.lora_B[span] @ factors.lora_A if tall else factors.lora_B @ factors.lora_A[:, span]
        energy += float(block.square().sum())
        lost += float((block - product).square().sum())
    return energy, lost, spectrum.singular_values


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    energy = sum(row["energy"] for row in rows)
    lost, best = sum(row["residual"] for row in rows), sum(row["energy"] * row["optimum"] ** 2 for row in rows)
    return {
        "matrices": len(rows),
        "error": math.sqrt(lost / energy) if energy else math.inf if lost else 0.0,
        "optimum": math.sqrt(best / energy) if energy else 0.0,
    }
