"""Which factors of an adapter stand for which matrix, and which stand for none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from deltaspec.io.matrix import read_low_rank
from deltaspec.pairing.modules import group_modules
from deltaspec.types import LowRankDelta, LowRankSource, MatrixKey, MatrixSource, WeightPair
from deltaspec.workflows.verification.claims import Claims
from deltaspec.workflows.verification.tied_factors import name_tied
from deltaspec.workflows.verification.trio import Trio

PlacedFactors = tuple[LowRankSource, tuple[int, ...] | None]
Spot = tuple[str, int | None, str]


@dataclass(frozen=True, slots=True)
class Check:
    """One matrix of both models, and the error that is claimed for it.

    ``factors`` are each stored product with the rows of the matrix that it changes, None for all; none where the
    adapter leaves the matrix as it is. ``stray`` ones change a matrix of which the report claims nothing.
    """

    pair: WeightPair
    factors: tuple[PlacedFactors, ...]
    claimed: float | None
    stray: bool = False


@dataclass(frozen=True, slots=True)
class Matched:
    """Matrices to be checked, in their order, and what needs no check.

    ``homeless`` are factors that change something which no matrix of both models is; ``missing`` are matrices for
    which factors are claimed and not there.
    """

    checks: tuple[Check, ...]
    homeless: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def match_factors(trio: Trio) -> Matched:
    """Find each matrix's factors: by parts of fused matrices where the report claims parts, else by whole ones.

    Without claims all that the adapter changes is checked.
    """
    modules = (group_modules(trio.changed, trio.base, split_fused=split)[0] for split in (False, True))
    wholes, parts = ({str(pair.key): pair for module in found for pair in module.pairs} for found in modules)
    stored: defaultdict[tuple[str, int | None], list[WeightPair]] = defaultdict(list)
    for pair in trio.adapted.pairs:
        if isinstance(pair.tuned, LowRankSource):
            stored[pair.key.tensor, pair.key.expert].append(pair)
    if trio.claims is None:
        checks = (_check(pair, stored[pair.key.tensor, pair.key.expert], None) for pair in wholes.values())
        return Matched(tuple(check for check in checks if check.factors))
    known = parts | wholes
    claimed, missing = _match_claims(trio.claims, known, stored)
    twins = name_tied(trio, trio.claims)
    others = [pair for pairs in stored.values() for pair in pairs if pair.key.tensor not in twins]
    strays, homeless = _find_strays(claimed, known.values(), others)
    return Matched((*claimed, *strays), tuple(homeless), tuple(missing))


def _match_claims(
    claims: Claims, known: dict[str, WeightPair], stored: defaultdict[tuple[str, int | None], list[WeightPair]]
) -> tuple[list[Check], list[str]]:
    """Return a check of each matrix that is claimed, and those whose factors are missing."""
    checks, missing = [], []
    for key, claim in claims.matrices.items():
        delta = known.get(key)
        check = _check(delta, stored[delta.key.tensor, delta.key.expert], claim.error) if delta else None
        checks += [check] if check else []
        if claim.rank and not (check and check.factors):
            missing.append(key)
    return checks, missing


def _check(pair: WeightPair, stored: Iterable[WeightPair], claimed: float | None, *, stray: bool = False) -> Check:
    """Gather a matrix's factors: its own, or those of its parts with their rows."""
    pieces: list[PlacedFactors] = []
    for other in stored:
        assert isinstance(other.tuned, LowRankSource)
        assert isinstance(other.base, MatrixSource)  # the base is a checkpoint
        if other.key.part == pair.key.part:
            pieces.append((other.tuned, None))
        elif not pair.key.part:
            pieces.append((other.tuned, tuple(other.base.view.take(torch.arange(pair.shape[0])).tolist())))
    return Check(pair, tuple(pieces), claimed, stray)


def _find_strays(
    checks: Sequence[Check], known: Iterable[WeightPair], stored: Sequence[WeightPair]
) -> tuple[list[Check], list[str]]:
    """Find factors that no claim stands for, where they change anything; those of no matrix by their names."""
    claimed = {_spot(check.pair.key) for check in checks}
    split = {tensor for tensor, _, part in claimed if part}
    places = {_spot(pair.key): pair for pair in known}
    strays, homeless = [], []
    for pair in stored:
        spots = [_spot(pair.key), (*_spot(pair.key)[:2], "")]
        if claimed.intersection(spots) or not _changes(pair.tuned):
            continue
        if pair.key.tensor not in split:
            spots.reverse()
        delta = next((places[spot] for spot in spots if spot in places), None)
        if delta is None:
            homeless.append(str(pair.key))
        elif _spot(delta.key) not in claimed:
            claimed.add(_spot(delta.key))
            same = [p for p in stored if _spot(p.key)[:2] == _spot(delta.key)[:2]]
            strays.append(_check(delta, same, None, stray=True))
    return strays, homeless


def _spot(key: MatrixKey) -> Spot:
    return key.tensor, key.expert, key.part


def _changes(source: object) -> bool:
    """Tell whether stored factors have a product other than zero."""
    assert isinstance(source, LowRankSource)
    factors = read_low_rank(source)
    return bool(((factors.lora_B.mT @ factors.lora_B) * (factors.lora_A @ factors.lora_A.mT)).sum() > 0)


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
