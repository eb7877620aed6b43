"""One budget of parameters spent over all matrices, where each number stored keeps most energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaspec.errors import OptionError
from deltaspec.extraction.ranks import EPS

Vector = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Unit:
    """One matrix, or several that must share one rank (a stack of experts).

    Attributes
    ----------
    energies : ndarray, (k,), float64
        σᵢ² in descending order, summed over the unit's matrices, in squared units of the weights.
    cost : int
        What one more rank costs in parameters, d_out + d_in for each matrix.
    weight : float
        Multiplies its energies: 1/‖W‖² makes changes relative.
    """

    energies: Vector
    cost: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Allocation:
    """Ranks that a budget buys, and how far from the best they can be.

    Attributes
    ----------
    ranks : tuple of int
        One for each unit.
    spent, leftover : int
        Parameters.
    captured, total : float
        Σ weight·σ² of what is kept and of everything.
    next_density : float
        The weighted energy per parameter of the first direction that the budget refused.
    loss_bound : float
        No allocation of this budget captures more than ``captured + loss_bound``.
    exact : bool
        None captures more at all.

    Notes
    -----
    Inside a unit densities do not increase, so every prefix of all directions, sorted by density, is feasible. By an
    exchange argument the longest one that fits captures at most leftover × next_density less than the best allocation
    does, and what the leftover buys is deducted from that. All costs are multiples of their greatest common divisor, so
    only whole multiples of it count as left over: with equal costs the prefix is always the best, as it is wherever it
    exhausts the budget.
    """

    ranks: tuple[int, ...]
    spent: int
    leftover: int
    captured: float
    total: float
    next_density: float
    loss_bound: float
    exact: bool


def allocate_ranks(units: Sequence[Unit], budget: int, *, min_rank: int = 0, max_rank: int | None = None) -> Allocation:
    """Choose ranks that maximise Σ_l Σ_{i≤r_l} w_l·σ²_{l,i} subject to Σ r_l·c_l ≤ budget.

    Directions of all units are sorted by w·σ²/c (stable: equal ones in the order given), and the longest prefix that
    fits is taken; what is left then buys later directions that fit, the densest first. A unit's tail under k·eps of its
    energy is rounding (``ranks.rank_for_energy``) and is never bought.

    Parameters
    ----------
    units : sequence of Unit
    budget : int
        Parameters.
    min_rank, max_rank : int
        Bounds of every rank; a maximum of None is none. A unit gets no directions without energy all the same.

    Raises
    ------
    OptionError
        If the budget does not pay for the minimum, or for no direction at all.

    Examples
    --------
    >>> found = allocate_ranks([Unit(np.array([9.0, 1.0]), cost=4), Unit(np.array([4.0, 4.0]), cost=2)], budget=8)
    >>> found.ranks, found.captured, found.exact
    ((1, 2), 17.0, True)
    """
    chosen = [_usable(unit, max_rank) for unit in units]
    ranks = np.array([min(min_rank, len(energies)) for energies in chosen], dtype=np.int64)
    costs = np.array([unit.cost for unit in units], dtype=np.int64)
    _check(chosen, costs, budget=budget, forced=int(ranks @ costs), min_rank=min_rank)
    densities = [energies / unit.cost for energies, unit in zip(chosen, units, strict=True)]
    next_density = _take_prefix(ranks, densities, costs, budget)
    leftover = budget - int(ranks @ costs)
    step = math.gcd(*costs[[len(energies) > 0 for energies in chosen]].tolist()) or 1
    bound = (leftover - leftover % step) * next_density
    gain = _fill(ranks, densities, costs, leftover) if next_density else 0.0
    spent, loss = int(ranks @ costs), max(0.0, bound - gain)
    captured = math.fsum(float(energies[:r].sum()) for energies, r in zip(chosen, ranks, strict=True))
    total = math.fsum(unit.weight * float(unit.energies.sum()) for unit in units)
    return Allocation(
        tuple(ranks.tolist()), spent, budget - spent, captured, total, next_density, loss, exact=loss == 0.0
    )


def _take_prefix(ranks: Integers, densities: Sequence[Vector], costs: Integers, budget: int) -> float:
    """Raise ranks by the densest directions of all units while they fit; return the density of the next one."""
    owner = np.repeat(np.arange(len(ranks)), [len(d) - r for d, r in zip(densities, ranks, strict=True)])
    pool = np.concatenate([d[r:] for d, r in zip(densities, ranks, strict=True)] or [np.zeros(0)])
    order = np.argsort(-pool, kind="stable")
    paid = np.cumsum(costs[owner[order]])
    taken = int(np.searchsorted(paid, budget - int(ranks @ costs), side="right"))
    ranks += np.bincount(owner[order[:taken]], minlength=len(ranks)).astype(np.int64)
    return float(pool[order[taken]]) if taken < len(order) else 0.0


def _usable(unit: Unit, max_rank: int | None) -> Vector:
    """Weighted energies of the directions worth a rank: those that together exceed rounding, at most ``max_rank``."""
    tails = np.cumsum(unit.energies[::-1])[::-1]
    count = int((tails > len(tails) * EPS * tails[:1]).sum())
    return unit.weight * unit.energies[: count if max_rank is None else min(count, max_rank)]


def _check(chosen: Sequence[Vector], costs: Integers, *, budget: int, forced: int, min_rank: int) -> None:
    if forced > budget:
        message = (
            f"--min-rank {min_rank} needs {forced:,} parameters over {len(chosen)} matrices and the budget is "
            f"{budget:,}: raise the budget or lower --min-rank."
        )
        raise OptionError(message)
    cheapest = min((int(c) for c, energies in zip(costs, chosen, strict=True) if len(energies)), default=0)
    if budget < cheapest:
        message = (
            f"The budget of {budget:,} parameters buys nothing: the smallest of {len(chosen)} matrices needs "
            f"{cheapest:,} for rank 1; raise the budget."
        )
        raise OptionError(message)


def _fill(ranks: Integers, densities: Sequence[Vector], costs: Integers, leftover: int) -> float:
    """Spend the leftover on next directions that fit, the densest first; return the energy gained."""
    upcoming = np.array([d[r] if r < len(d) else 0.0 for d, r in zip(densities, ranks, strict=True)])
    gain = 0.0
    while True:
        fitting = np.where(costs <= leftover, upcoming, 0.0)
        best = int(fitting.argmax())
        if fitting[best] == 0.0:
            return gain
        gain += float(upcoming[best] * costs[best])
        leftover -= int(costs[best])
        ranks[best] += 1
        upcoming[best] = densities[best][ranks[best]] if ranks[best] < len(densities[best]) else 0.0


def uniform_rank(units: Sequence[Unit], budget: int, *, min_rank: int = 0, max_rank: int | None = None) -> int:
    """Return the largest single rank at which all units with energy fit the budget, each stored at that full rank.

    Parameters
    ----------
    units : sequence of Unit
    budget : int
        Parameters.
    min_rank, max_rank : int
        Bounds of the rank; a maximum of None is none.

    Raises
    ------
    OptionError
        If the budget does not pay for the minimum, or for rank 1.

    Examples
    --------
    >>> uniform_rank([Unit(np.array([9.0, 1.0]), cost=4), Unit(np.array([4.0, 4.0]), cost=2)], budget=11)
    1
    """
    changed = [unit for unit in units if unit.energies.size and unit.energies[0] > 0]
    step, least = sum(unit.cost for unit in changed), max(min_rank, 1)
    if least * step > budget:
        message = (
            f"The budget of {budget:,} parameters buys no common rank: {least} for all {len(changed)} matrices needs "
            f"{least * step:,}; raise the budget."
        )
        raise OptionError(message)
    longest = max((len(_usable(unit, max_rank)) for unit in changed), default=0)
    return min(max(longest, min_rank), budget // step) if step else 0
