"""What an adapter claims and what it holds: which factors stand for which matrix, and which stand for none."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from deltaspec.errors import CheckpointError
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import fingerprint
from deltaspec.io.peft_targets import Layout
from deltaspec.io.running import SHARED
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.pairing.homes import factor_shape
from deltaspec.pairing.modules import group_modules
from deltaspec.pairing.plan import Plan
from deltaspec.types import (
    AdapterIndex,
    Checkpoint,
    LowRankDelta,
    LowRankSource,
    LowRankTerm,
    MatrixKey,
    MatrixSource,
    View,
    WeightPair,
)

ALIKE = 1e-9  # of ‖BA‖: two modules tied to one weight store the same numbers
Piece = tuple[LowRankSource, tuple[int, ...] | None]
Spot = tuple[str, int | None, str]


@dataclass(frozen=True, slots=True)
class Claims:
    """What ``deltaspec.json`` says: matrix → error and rank, tensors stored whole, modules with their bias."""

    matrices: dict[str, dict[str, float]]
    whole: tuple[str, ...]
    biased: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """One matrix of both models, and the error that is claimed for it.

    ``factors`` are each stored product with the rows of the matrix that it changes, None for all; none where the
    adapter leaves the matrix as it is. ``stray`` ones change a matrix of which the report claims nothing.
    """

    pair: WeightPair
    factors: tuple[Piece, ...]
    claimed: float | None
    stray: bool = False


@dataclass(slots=True)
class Matched:
    """Matrices to be checked, and what is already known to be worse than claimed, or missing."""

    checks: list[Check] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_claims(adapter: AdapterIndex, tuned: Checkpoint | AdapterIndex) -> Claims | None:
    """Read what ``deltaspec.json`` says; None where there is none, or it speaks of another model.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    path = adapter.root / "deltaspec.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("tuned", {}).get("files") != fingerprint(tuned):
            return None
        rows = {row["matrix"]: {"error": float(row["error"]), "rank": int(row["rank"])} for row in found["matrices"]}
        gone = {row["tensor"] for row in found["not_carried"]}
        biased = tuple(p for p, module in found["modules"].items() if module["bias"] and f"{p}.bias" not in gone)
        return Claims(rows, tuple(map(str, found["whole"])), biased)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as cause:
        message = f"Cannot read the claims in '{path}' ({cause}): extract the adapter again."
        raise CheckpointError(message) from cause


def match(plan: Plan, adapted: Plan, base: Checkpoint, *, claims: Claims | None) -> Matched:
    """Find each matrix's factors: by parts of fused matrices where the report claims parts, else by whole ones.

    Parameters
    ----------
    plan, adapted : Plan
        Base against the fine-tune, and against the adapter.
    base : Checkpoint
    claims : Claims or None
        Without, all that the adapter changes is checked.
    """
    modules = (group_modules(plan, base, split_fused=split)[0] for split in (False, True))
    wholes, parts = ({str(pair.key): pair for module in found for pair in module.pairs} for found in modules)
    known = parts | wholes
    stored: defaultdict[tuple[str, int | None], list[WeightPair]] = defaultdict(list)
    for pair in adapted.pairs:
        if isinstance(pair.tuned, LowRankSource):
            stored[pair.key.tensor, pair.key.expert].append(pair)
    if claims is None:
        return Matched(
            [c for p in wholes.values() if (c := _check(p, stored[p.key.tensor, p.key.expert], None)).factors]
        )
    found = Matched()
    for key, claim in claims.matrices.items():
        delta = known.get(key)
        if delta:
            found.checks.append(_check(delta, stored[delta.key.tensor, delta.key.expert], claim["error"]))
        if claim["rank"] and not (delta and found.checks[-1].factors):
            found.missing.append(key)
    _add_strays(found, known, [pair for pairs in stored.values() for pair in pairs], twins=_twins(plan, base, claims))
    return found


def _check(pair: WeightPair, stored: list[WeightPair], claimed: float | None) -> Check:
    """Gather a matrix's factors: its own, or those of its parts with their rows."""
    pieces: list[Piece] = []
    for other in stored:
        assert isinstance(other.tuned, LowRankSource)
        assert isinstance(other.base, MatrixSource)  # the base is a checkpoint
        if other.key.part == pair.key.part:
            pieces.append((other.tuned, None))
        elif not pair.key.part:
            pieces.append((other.tuned, tuple(other.base.view.take(torch.arange(pair.shape[0])).tolist())))
    return Check(pair, tuple(pieces), claimed)


def _add_strays(found: Matched, known: dict[str, WeightPair], stored: list[WeightPair], *, twins: set[str]) -> None:
    """Add factors that no claim stands for, where they change anything."""
    claimed = {_spot(check.pair.key) for check in found.checks}
    split = {tensor for tensor, _, part in claimed if part}
    places = {_spot(pair.key): pair for pair in known.values()}
    for pair in stored:
        spots = [_spot(pair.key), (*_spot(pair.key)[:2], "")]
        if claimed.intersection(spots) or pair.key.tensor in twins or not _changes(pair.tuned):
            continue
        if pair.key.tensor not in split:
            spots.reverse()
        delta = next((places[spot] for spot in spots if spot in places), None)
        if delta is None:
            found.worse.append(str(pair.key))
        elif _spot(delta.key) not in claimed:
            claimed.add(_spot(delta.key))
            same = [p for p in stored if _spot(p.key)[:2] == _spot(delta.key)[:2]]
            found.checks.append(Check(delta, _check(delta, same, None).factors, None, stray=True))


def _spot(key: MatrixKey) -> Spot:
    return key.tensor, key.expert, key.part


def _changes(source: object) -> bool:
    """Tell whether stored factors have a product other than zero."""
    assert isinstance(source, LowRankSource)
    factors = read_low_rank(source)
    return bool(((factors.lora_B.mT @ factors.lora_B) * (factors.lora_A @ factors.lora_A.mT)).sum() > 0)


def check_twins(plan: Plan, adapter: AdapterIndex, base: Checkpoint, *, claims: Claims) -> tuple[list[str], list[str]]:
    """Compare the factors of an embedding with those of every module that is tied to it.

    Returns
    -------
    worse : list of str
        Tensors of modules whose product is another than the embedding's.
    missing : list of str
        Those that have no factors.
    """
    worse, missing = [], []
    for paths in _tied_paths(plan, base, claims):
        held = [path for path in paths if path in adapter.modules]
        missing += [f"{path}.weight" for path in paths if path not in held] if held else []
        worse += [f"{path}.weight" for path in held[1:] if not _alike(adapter.modules[held[0]], adapter.modules[path])]
    return worse, missing


def make_layout(plan: Plan, base: Checkpoint) -> Layout:
    """Lay the base out as the running model has it, without ties to heads that the fine-tune holds apart."""
    return Layout(base, sorted({pair.key.tensor for pair in plan.pairs if pair.key.role == "lm_head"}))


def _tied_paths(plan: Plan, base: Checkpoint, claims: Claims) -> list[list[str]]:
    """List, for each claimed embedding, the modules of the running model that its factors are written for."""
    layout, found = make_layout(plan, base), []
    for module in group_modules(plan, base, split_fused=False)[0]:
        claim = claims.matrices.get(str(module.pairs[0].key))
        if module.kind == "embedding" and claim and claim["rank"]:
            path = layout.place(module.path)[0].name.removesuffix(".weight")
            uses = [use for use, _ in layout.uses(path) if layout.running.get(f"{use}.weight") not in claims.matrices]
            found.append(uses if SHARED.fullmatch(path) else [path, *uses])
    return [paths for paths in found if len(paths) > 1]


def _twins(plan: Plan, base: Checkpoint, claims: Claims) -> set[str]:
    """Name the tensors whose factors are those of an embedding that they are tied to."""
    running = make_layout(plan, base).running
    names = {f"{path}.weight" for paths in _tied_paths(plan, base, claims) for path in paths}
    return names | {running[name] for name in names if name in running}


def _alike(first: LowRankTerm, second: LowRankTerm) -> bool:
    if factor_shape(first) != factor_shape(second):
        return False
    one, other = (read_low_rank(LowRankSource((term,), View(factor_shape(term)))) for term in (first, second))
    size = svd_of_product(one.lora_B, one.lora_A)[1].norm()
    lora_B, lora_A = torch.cat([one.lora_B, -other.lora_B], dim=1), torch.cat([one.lora_A, other.lora_A])
    return bool(svd_of_product(lora_B, lora_A)[1].norm() <= ALIKE * size)


def read_factors(check: Check) -> LowRankDelta:
    """Read a matrix's factors, those of its parts side by side: (r, d_in) and (d_out, r), float64.

    Raises
    ------
    CheckpointError
        If they cannot be read.
    """
    d_out, d_in = check.pair.shape
    pieces_A, pieces_B = [torch.zeros(0, d_in, dtype=torch.float64)], [torch.zeros(d_out, 0, dtype=torch.float64)]
    for source, rows in check.factors:
        found = read_low_rank(source)
        if rows is None:
            return found  # of a vocabulary that shrank, rows that only the base has are among them
        pieces_A.append(found.lora_A)
        empty = found.lora_B.new_zeros(d_out, found.lora_B.shape[1])
        pieces_B.append(empty.index_copy_(0, torch.tensor(rows), found.lora_B))
    return LowRankDelta(torch.cat(pieces_A), torch.cat(pieces_B, dim=1))
