"""Every metric again, in NumPy float64 from the two dense matrices; shares no code with deltaspec."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
SMALLEST = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126}


def law(beta):
    """Density of x = σ²/N under the Marchenko–Pastur law, and its support."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    return (lambda x: math.sqrt(max((high - x) * (x - low), 0.0)) / (2 * math.pi * beta * x)), low, high


def integral(function, low, high):
    """Integrate with the square-root ends of the law substituted away."""
    middle, half = (low + high) / 2, (high - low) / 2
    return quad(lambda t: function(middle - half * math.cos(t)) * half * math.sin(t), 0, math.pi, limit=200)[0]


@cache
def nulls(d_out, d_in):
    """rank_90, effective rank and the median of x for noise of this shape."""
    side, beta = min(d_out, d_in), min(d_out, d_in) / max(d_out, d_in)
    f, low, high = law(beta)
    t = brentq(lambda t: integral(lambda x: x * f(x), t, high) - 0.9, low + 1e-12, high - 1e-12, xtol=1e-10)
    rank = side * integral(f, t, high)
    mean = integral(lambda x: math.sqrt(x) * f(x), low, high)
    entropy = integral(lambda x: math.sqrt(x) * math.log(math.sqrt(x) / mean / side) * f(x), low, high) / mean
    median = brentq(lambda t: integral(f, low, t) - 0.5, low + 1e-12, high - 1e-12, xtol=1e-12)
    return rank, math.exp(-entropy), median


def entropy_rank(p):
    p = p[p > 0] / p.sum() if p.sum() else p[:0]
    return math.exp(-(p * np.log(p)).sum()) if p.size else 0.0


def energy_rank(squares, share):
    kept = 0.0
    for k, value in enumerate(squares, 1):
        kept += value
        if kept >= share * squares.sum() * (1 - 1e-13):
            return k
    return 0


def ulp(w, dtype):
    exponent = np.floor(np.log2(np.maximum(np.abs(w), 2.0 ** SMALLEST[dtype])))
    return 2.0 ** (exponent - MANTISSA[dtype])


def metrics(base, tuned, dtype):
    """All metrics of a delta whose tuned side is stored as ``dtype``; ranks near a threshold may differ by one."""
    delta = tuned - base
    s = np.linalg.svd(delta, compute_uv=False)
    m, n = delta.shape
    side, long = min(m, n), max(m, n)
    squares, total = s**2, (s**2).sum()
    rank_null, effective_null, median = nulls(m, n)
    ulps = ulp(tuned, dtype) ** 2
    changed = delta != 0
    ulps *= changed.any(axis=1, keepdims=True) if m >= n else changed.any(axis=0, keepdims=True)
    edge = math.sqrt(ulps.sum(1).max() / 12) + math.sqrt(ulps.sum(0).max() / 12)
    sigma = np.median(s) / math.sqrt(long * median)
    root = math.sqrt(long - 1) + math.sqrt(side)
    tracy = sigma * math.sqrt(root**2 + 2.0234 * root * (1 / math.sqrt(long - 1) + 1 / math.sqrt(side)) ** (1 / 3))
    above, rank_90 = int((s > edge).sum()), energy_rank(squares, 0.9)
    eps = np.finfo(np.float64 if dtype == "F64" else np.float32).eps
    return {
        "frobenius_norm": np.linalg.norm(delta),
        "base_norm": np.linalg.norm(base),
        "relative_norm": np.linalg.norm(delta) / np.linalg.norm(base),
        "spectral_norm": s[0],
        "nuclear_norm": s.sum(),
        "stable_rank": total / s[0] ** 2 if total else 0.0,
        "effective_rank": entropy_rank(s),
        "energy_effective_rank": entropy_rank(squares),
        "participation_ratio": total**2 / (squares**2).sum() if total else 0.0,
        "rank_90": rank_90,
        "rank_95": energy_rank(squares, 0.95),
        "rank_99": energy_rank(squares, 0.99),
        "numerical_rank": int((s > max(m, n) * eps * s[0]).sum()),
        "rank_90_null": max(1, round(rank_null)),
        "rank_90_ratio": rank_90 / max(1, round(rank_null)),
        "effective_rank_null": max(1.0, effective_null),
        "effective_rank_ratio": entropy_rank(s) / max(1.0, effective_null),
        "unchanged_fraction": (~changed).mean(),
        "update_to_ulp": math.sqrt(total / ulps.sum()) if ulps.sum() else None,
        "rounding_edge": edge,
        "rank_above_rounding": above,
        "energy_above_rounding": squares[:above].sum() / total if total else None,
        "resolved": (above > 0 and ulps.sum() / 12 < 0.1 * total) if total else None,
        "noise_sigma": sigma,
        "rank_above_noise": int((s > tracy).sum()),
    }
