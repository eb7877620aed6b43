"""Is an adapter as good as it claims: its files read back, and held against ΔW from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deltaspec.architecture.peft_names import list_unloaded
from deltaspec.engine.local import resolve_devices
from deltaspec.engine.local import run as run_engine
from deltaspec.errors import MismatchError, PairingError
from deltaspec.io.attachment import find_unattached
from deltaspec.options import AnalyzeOptions
from deltaspec.types import OneSidedBlocks, Step
from deltaspec.workflows.shared.workers import Headway, Workers
from deltaspec.workflows.verification.beside_factors import CheckedTensor, check_beside
from deltaspec.workflows.verification.match_factors import Check, match_factors
from deltaspec.workflows.verification.recompute_matrix import (
    CheckedMatrix,
    Totals,
    memory_of,
    recompute_matrix,
    total,
)
from deltaspec.workflows.verification.tied_factors import check_tied
from deltaspec.workflows.verification.trio import Trio, open_trio


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found.

    Attributes
    ----------
    rows : tuple of CheckedMatrix
        Each matrix.
    rest : tuple of CheckedTensor
        Each bias and each tensor stored whole.
    totals : Totals
    worse : tuple of str
        What is not as good as ``deltaspec.json`` claims.
    missing : tuple of str
        What it claims and is not there.
    claims : bool
        Whether there was a ``deltaspec.json`` that speaks of this fine-tune.
    unattached : tuple of str
        Factors and whole tensors that would not change what they name once PEFT loads the adapter, each with why.
    attachment : str
        Whether that is known, and by what.
    one_sided : list of OneSidedBlocks
        Blocks that only the base or only the fine-tune has, of which nothing was checked.
    """

    rows: tuple[CheckedMatrix, ...]
    rest: tuple[CheckedTensor, ...]
    totals: Totals
    worse: tuple[str, ...]
    missing: tuple[str, ...]
    claims: bool
    unattached: tuple[str, ...] = ()
    attachment: str = ""
    one_sided: list[OneSidedBlocks] = field(default_factory=list)


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
    try:
        trio = open_trio(base, tuned, adapter, options)
    except MismatchError as error:
        raise PairingError(error.advise(vocab=True)) from error  # nothing can be left out of a verification
    matched = match_factors(trio)
    workers = Workers(resolve_devices(options.device, options.workers), options.memory, progress)
    rows = _recompute(matched.checks, workers)
    rest, absent = check_beside(trio)
    worse, missing = list(matched.homeless), list(matched.missing)
    if trio.claims:
        untrue, lacking = check_tied(trio, trio.claims)
        worse = [row.matrix for row in rows if row.worse and row.matrix not in matched.missing] + worse + untrue
        worse += [row.tensor for row in rest if not row.right]
        missing += lacking + absent + list_unloaded(trio.adapter)
    found = Verification(tuple(rows), tuple(rest), total(rows), tuple(worse), tuple(missing), trio.claims is not None)
    idle, one_sided = tuple(_list_idle(trio)), trio.changed.one_sided
    return replace(found, unattached=idle, attachment=trio.layout.attachment, one_sided=one_sided)


def _list_idle(trio: Trio) -> list[str]:
    """Say what would have no effect once PEFT loads the adapter, and why."""
    idle = [f"'{name}' ({why})" for name, why in find_unattached(trio.adapter, trio.layout).items()]
    wrapped = trio.adapter.wrapped
    return idle + ([f"{len(wrapped)} tensors whose keys name wrappers ('{wrapped[0]}')"] if wrapped else [])


def _recompute(checks: Sequence[Check], workers: Workers) -> list[CheckedMatrix]:
    """Check every matrix, and return the rows in the order of the checks."""
    rows: dict[str, CheckedMatrix] = {}
    headway = Headway(len(checks), sum(math.prod(check.pair.shape) for check in checks), workers.progress)
    budget = workers.memory or 2 * max(map(memory_of, checks), default=0) + (48 << 20)
    for outcome in run_engine(checks, recompute_matrix, devices=workers.devices, cost=memory_of, budget=budget):
        if outcome.value is None:
            raise outcome.failure or RuntimeError(str(outcome.item.pair.key))
        rows[outcome.value.matrix] = outcome.value
        headway.add(work=math.prod(outcome.item.pair.shape))
    return [rows[str(check.pair.key)] for check in checks]
