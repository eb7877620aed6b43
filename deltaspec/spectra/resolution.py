"""What of a spectrum stands above rounding and noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deltaspec.spectra.evidence import Evidence, Value
from deltaspec.spectra.noise import edge_of_rounding, noise_edge

ROUNDING_SHARE = 0.1  # rank_90 leaves out 10 % of the energy: more rounding than that, and it counts rounding


def numerical_rank(e: Evidence) -> int:
    """Count σ > max(d_out, d_in)·eps·σ₁, and never one below the error bound.

    eps is 2⁻²³, or 2⁻⁵² where a file holds float64: finer digits than the stored precision has would count rounding.

    References
    ----------
    NumPy's ``linalg.matrix_rank`` (Press et al., Numerical recipes, 3rd ed., section 2.6), with eps of the storage.
    """
    if e.zero:
        return 0
    eps = e.rounding.eps if e.rounding else 2.0**-23
    return e.above(max(max(e.shape) * eps * float(e.values[0]), e.error_bound))


def update_to_ulp(e: Evidence) -> float | None:
    """Return rms(ΔW) over rms(ulp), both over the rows or columns that changed at all; None without rounding.

    Below 1 most single changes are smaller than the spacing of the stored numbers, and rounding shapes what is left.
    """
    if e.rounding is None or e.rounding.ulp_energy == 0.0:
        return None
    return float(np.sqrt(e.energy / e.rounding.ulp_energy))


def rounding_edge(e: Evidence) -> float | None:
    """Return the largest σ that storage rounding alone explains, in units of the weights; 0 for an adapter.

    None for spectra of a base or tuned matrix itself. The formula is that of ``edge_of_rounding``.
    """
    if e.unrounded:
        return 0.0
    return edge_of_rounding(e.rounding) if e.rounding else None


def rank_above_rounding(e: Evidence) -> int | None:
    """Count the singular values above the rounding edge, and above the error bound; None where there is no edge.

    It is the rank of a merged LoRA, where energy ranks count its rounding; see ``spectra.noise.edge_of_rounding``.
    """
    edge = rounding_edge(e)
    return None if edge is None else e.above(max(edge, e.error_bound))


def energy_above_rounding(e: Evidence) -> float | None:
    """Return the share of Σσ², 0 to 1, in the singular values above the rounding edge; None of a zero matrix."""
    count = rank_above_rounding(e)
    if count is None or e.zero:
        return None
    return float(e.squares[:count].sum() / e.sum_squares)


def resolved(e: Evidence) -> bool | None:
    """Tell whether training and not rounding decides rank_90: some σ above the edge, under 10 % of energy predicted.

    The predicted rounding energy is Σ ulp²/12; None where there is no delta to resolve.
    """
    count = rank_above_rounding(e)
    if count is None or e.zero:
        return None
    predicted = e.rounding.ulp_energy / 12 if e.rounding else 0.0
    return count > 0 and predicted < ROUNDING_SHARE * e.energy


def counts_rounding(metrics: Mapping[str, Value], rank: str) -> bool:
    """Tell whether a rank counts directions that storage rounding explains.

    Parameters
    ----------
    metrics : mapping
        A record's metrics.
    rank : str
        Name of a rank among them: it does where it exceeds ``rank_above_rounding``, or ``resolved`` is False. The
        effective rank weighs σ and not σ², so it does long before energy ranks do.
    """
    value, above = metrics.get(rank), metrics.get("rank_above_rounding")
    return metrics.get("resolved") is False or (value is not None and above is not None and value > above)


def rank_above_noise(e: Evidence) -> int:
    """Count the singular values above the edge of dense noise of the estimated size (99 % quantile of its σ₁).

    References
    ----------
    Gavish & Donoho 2014 (σ from the median); Johnstone, On the distribution of the largest eigenvalue, 2001 (edge).
    """
    return e.above(max(noise_edge(e.noise, *e.shape), e.error_bound))
