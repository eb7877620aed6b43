"""What storage rounding alone explains, and what noise of unknown size does; nothing is cut, only counted."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deltaspec.spectra.nulls import median_of_law
from deltaspec.types import Rounding

TRACY_WIDOM_99 = 2.0234  # 99 % quantile of the Tracy–Widom law of order 1
Vector = NDArray[np.float64]


def edge_of_rounding(rounding: Rounding) -> float:
    """Largest singular value that rounding alone explains: √max_i Σ_j v_ij + √max_j Σ_i v_ij with v = ulp²/12.

    That is σ(√m + √n) where all entries have one variance; rows and columns of uneven scale raise it as they should.

    References
    ----------
    Bandeira & van Handel, Annals of Probability 2016, theorem 3.1 (leading terms).
    """
    return math.sqrt(rounding.row_max / 12) + math.sqrt(rounding.column_max / 12)


def noise_sigma(values: Vector, d_out: int, d_in: int) -> float:
    """Estimate the standard deviation of dense noise from the median singular value: median(σ)/√(N·μ_β).

    Parameters
    ----------
    values : (k,) float64
        All singular values; a low-rank source's missing ones are zeros. Needs a signal rank well under half the side.

    References
    ----------
    Gavish & Donoho, The optimal hard threshold for singular values is 4/√3, IEEE Trans. Inf. Theory 2014.
    """
    side, length = min(d_out, d_in), max(d_out, d_in)
    if side == 0:
        return 0.0
    padded = np.zeros(side)
    padded[: values.size] = values[:side]
    return float(np.median(padded)) / math.sqrt(length * median_of_law(d_out, d_in))


def noise_edge(sigma: float, d_out: int, d_in: int) -> float:
    """Singular value that noise of this standard deviation exceeds once in a hundred matrices.

    References
    ----------
    Johnstone, Annals of Statistics 2001: σ₁² of noise is μ + s·TW₁ with μ = (√(N-1) + √a)² and
    s = √μ·(1/√(N-1) + 1/√a)^⅓.
    """
    side, length = min(d_out, d_in), max(d_out, d_in)
    if side == 0 or length < 2:
        return sigma * (math.sqrt(side) + math.sqrt(length))
    root = math.sqrt(length - 1) + math.sqrt(side)
    spread = root * (1 / math.sqrt(length - 1) + 1 / math.sqrt(side)) ** (1 / 3)
    return sigma * math.sqrt(root**2 + TRACY_WIDOM_99 * spread)
