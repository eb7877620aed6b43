"""How many directions carry a spectrum: by energy, and by entropy."""

from __future__ import annotations

import numpy as np

from deltaspec.spectra.noise import Vector


def energy_rank(squares: Vector, share: float) -> int:
    """Return the least k whose largest k squared singular values hold ``share`` of their sum; 0 for a zero matrix.

    Parameters
    ----------
    squares : array, (k,), float64
        σ², descending; only their ratios matter.
    share : float, 0 < share ≤ 1

    References
    ----------
    Biderman et al., LoRA learns less and forgets less, arXiv:2405.09673, section 5 (share 0.9).

    Examples
    --------
    >>> energy_rank(np.array([8.0, 1.0, 0.5, 0.5]), 0.9)
    2
    """
    total = squares.cumsum()
    if total.size == 0 or total[-1] == 0.0:
        return 0
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-15))) + 1


def entropy_rank(weights: Vector) -> float:
    """Return exp of the Shannon entropy of weights normalised to sum 1, in directions; 0 for a zero matrix.

    Parameters
    ----------
    weights : array, (k,), float64, not negative
        σ for the effective rank of Roy & Vetterli, σ² for that of the energy.

    References
    ----------
    Roy & Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.

    Examples
    --------
    >>> round(entropy_rank(np.array([3.0, 3.0, 3.0, 0.0])), 9)
    3.0
    """
    total = float(weights.sum())
    if total == 0.0:
        return 0.0
    p = weights / total
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
