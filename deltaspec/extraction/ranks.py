"""POLICIES: the ways to choose ranks, and their arithmetic on one matrix's singular values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.options import POLICY_HELP, RankOptions
from deltaspec.types import Truncation

EPS = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to choose ranks.

    Attributes
    ----------
    function : callable or None
        Takes (values, energy, amount) of one matrix and returns its rank; None where a budget is spent over all
        matrices at once (``budget.allocate_ranks``).
    description, unit : str
        What it does, and what its amount is.
    needs : str
        What must be known first: ``top`` (the amount alone), ``values`` (all singular values of this matrix) or ``all``
        (every spectrum of the model).
    """

    function: Callable[[Tensor, float, float], int] | None
    description: str
    unit: str
    needs: str


def rank_for_energy(values: Tensor, energy: float, share: float) -> int:
    """Return the least r with Σ_{i≤r} σᵢ² ≥ share·‖ΔW‖²; 0 for a zero matrix, all that count for a share of 1.

    Parameters
    ----------
    values : Tensor, (k,), descending
        All singular values, in units of the weights.
    energy : float
        ‖ΔW‖²_F, float64.
    share : float, in (0, 1]

    Notes
    -----
    Decided on tails Σ_{i>r} σᵢ², summed from the small end. A tail under k·eps of the energy counts as zero: rounding
    leaves .01 to .1 of that in the eigenvalues of a Gram matrix, and an update of exact rank 8 needs 8 for all of it.

    Examples
    --------
    >>> values = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    >>> [rank_for_energy(values, 10.0, share) for share in (0.5, 0.9, 0.95, 1.0)]
    [1, 1, 2, 2]
    """
    return _least(values, energy, (1 - share) * energy)


def rank_for_error(values: Tensor, energy: float, error: float) -> int:
    """Return the least r with √(Σ_{i>r} σᵢ² / ‖ΔW‖²) ≤ error, the Eckart-Young error; 0 for a zero matrix.

    Parameters
    ----------
    values : Tensor, (k,), descending
        All singular values, in units of the weights.
    energy : float
        ‖ΔW‖²_F, float64.
    error : float, in (0, 1]
        Below √(k·eps), 1e-6 at k = 4096, no larger rank is asked for: see ``rank_for_energy``.

    References
    ----------
    Eckart & Young, The approximation of one matrix by another of lower rank, Psychometrika 1936.

    Examples
    --------
    >>> rank_for_error(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64), 10.0, 0.2)
    2
    """
    return _least(values, energy, error * error * energy)


def _least(values: Tensor, energy: float, allowed: float) -> int:
    """Least r whose residual is at most ``allowed``, up to rounding; all nonzero values where none is."""
    squares = values.double().square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    slack = len(values) * EPS * energy
    # Energy that the values do not hold is out of reach of every rank; rounding alone is no such energy.
    missing = max(0.0, energy - float(tails[0]))
    tails += missing if missing > slack else 0.0
    return min(int((tails > allowed + slack).sum()), int((values > 0).sum()))


def rank_above(values: Tensor, edge: float) -> int:
    """Count the singular values above ``edge``.

    Parameters
    ----------
    values : Tensor, (k,)
        In units of the weights.
    edge : float
        The largest singular value that storage rounding alone explains, in the same unit.

    Examples
    --------
    >>> rank_above(torch.tensor([3.0, 1.0, 0.5]), 0.5)
    2
    """
    return int((values > edge).sum())


def clamp(rank: int, *, minimum: int, maximum: int, side: int) -> int:
    """Bring a rank between ``minimum`` and ``maximum``, and never above the matrix's smaller ``side``.

    Parameters
    ----------
    rank, minimum : int
    maximum : int
        0 is none.
    side : int
        min(d_out, d_in).

    Examples
    --------
    >>> [clamp(rank, minimum=4, maximum=8, side=6) for rank in (2, 5, 9)]
    [4, 5, 6]
    """
    return min(max(rank, minimum), maximum or side, side)


def _fixed(values: Tensor, energy: float, amount: float) -> int:
    """Rank as given, where there is anything to factorise."""
    return int(amount) if energy else 0


POLICIES = {
    "rank": Policy(_fixed, POLICY_HELP["rank"], "rank", "top"),
    "energy": Policy(rank_for_energy, POLICY_HELP["energy"], "share of energy", "values"),
    "error": Policy(rank_for_error, POLICY_HELP["error"], "relative", "values"),
    "above_rounding": Policy(
        lambda values, energy, edge: rank_above(values, edge),
        POLICY_HELP["above_rounding"],
        "singular value of the edge",
        "values",
    ),
    "params": Policy(None, POLICY_HELP["params"], "numbers", "all"),
    "size": Policy(None, POLICY_HELP["size"], "bytes", "all"),
}


@dataclass(frozen=True, slots=True)
class RankChoice:
    """How many directions of one matrix each of several adapters takes: given, or chosen from its singular values.

    Attributes
    ----------
    amounts : mapping
        Label of each adapter → its policy's amount, or this matrix's rank where ``given``.
    given : bool
        Ranks are known: a budget bought them.
    options : RankOptions
        The policy, with bounds of ranks that it chooses.
    side : int
        min(d_out, d_in), or the rank of stored factors: no rank is larger.
    edge : callable
        Returns the largest singular value that storage rounding alone explains; asked by one policy alone.

    Examples
    --------
    >>> choice = RankChoice({"energy-0.9": 0.9, "energy-1": 1.0}, False, RankOptions("energy", (0.9, 1.0)), side=3)
    >>> choice.choose(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    {'energy-0.9': 1, 'energy-1': 2}
    """

    amounts: Mapping[str, float]
    given: bool
    options: RankOptions
    side: int
    edge: Callable[[], float] = float

    @property
    def known(self) -> dict[str, int] | None:
        """Each adapter's rank, where it does not depend on the singular values; else None."""
        if self.given:
            return {label: min(int(rank), self.side) for label, rank in self.amounts.items()}
        if self.options.policy == "rank":
            return {label: self._clamp(int(amount)) for label, amount in self.amounts.items()}
        return None

    def choose(self, values: Tensor) -> dict[str, int]:
        """Return each adapter's rank from all singular values, (k,) float64, descending; 0 for a zero matrix."""
        energy, policy = float(values.square().sum()), POLICIES[self.options.policy]
        if policy.function is None or not energy:
            return {label: self._clamp(0) if energy else 0 for label in self.amounts}
        above = self.options.policy == "above_rounding"
        asked = {label: self.edge() if above else amount for label, amount in self.amounts.items()}
        return {label: self._clamp(policy.function(values, energy, amount)) for label, amount in asked.items()}

    @property
    def largest(self) -> int | Callable[[Tensor], int]:
        """The largest rank, as ``linalg.truncated.truncate`` wants it: a number, or what chooses it from the values."""
        return max(self.known.values()) if self.known else lambda values: max(self.choose(values).values())

    def settle(self, found: Truncation) -> dict[str, int]:
        """Return the ranks that a truncation of the largest one really has: no more directions than it holds."""
        ranks, held = self.known, found.singular_values.numel()
        if ranks is None:
            ranks = dict.fromkeys(self.amounts, 0) if found.values is None else self.choose(found.values)
        return {label: min(rank, held) for label, rank in ranks.items()}

    def _clamp(self, rank: int) -> int:
        return clamp(rank, minimum=self.options.minimum, maximum=self.options.maximum, side=self.side)
