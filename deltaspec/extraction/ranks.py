"""POLICIES: the ways to choose ranks, and their arithmetic on one matrix's singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.options import POLICY_HELP

EPS = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to choose ranks.

    ``function`` takes (values, energy, amount) of one matrix and returns its rank; None where a budget is spent over
    all matrices at once (``budget.allocate_ranks``). ``needs`` is what must be known first: ``top`` (the amount alone),
    ``values`` (all singular values of this matrix) or ``all`` (every spectrum of the model).
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
