"""METRICS: every number deltaspec reports of a matrix; their names are the columns of every table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deltaspec.spectra.evidence import Evidence, Value
from deltaspec.spectra.nulls import null_effective_rank, null_rank
from deltaspec.spectra.ranks import energy_rank, entropy_rank
from deltaspec.spectra.resolution import (
    energy_above_rounding,
    numerical_rank,
    rank_above_noise,
    rank_above_rounding,
    resolved,
    rounding_edge,
    update_to_ulp,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One column: its function, unit, formula and source."""

    function: Callable[[Evidence], Value]
    unit: str
    formula: str
    reference: str


def _ratio(value: float, null: float) -> float:
    return value / null if null else 0.0


_DIRECTIONS, _WEIGHTS, _ONE = "directions", "units of the weights", "1"
_BIDERMAN = "Biderman et al., arXiv:2405.09673, section 5"
_ROY = "Roy & Vetterli, EUSIPCO 2007"
_LAW = "Marchenko & Pastur 1967"
_STORE = "IEEE 754 spacing; Bandeira & van Handel 2016"
_GAVISH = "Gavish & Donoho 2014; Johnstone 2001"

METRICS: dict[str, Metric] = {
    "frobenius_norm": Metric(lambda e: e.norm, _WEIGHTS, "‖ΔW‖ = √Σ ΔW²", "Golub & Van Loan, section 2.3"),
    "base_norm": Metric(lambda e: e.base_norm, _WEIGHTS, "‖W_base‖", "Golub & Van Loan, section 2.3"),
    "relative_norm": Metric(
        lambda e: e.norm / e.base_norm if e.base_norm else None, _ONE, "‖ΔW‖/‖W_base‖", "Golub & Van Loan, section 2.3"
    ),
    "spectral_norm": Metric(
        lambda e: float(e.values[0]) if e.values.size else 0.0, _WEIGHTS, "σ₁", "Golub & Van Loan, section 2.3"
    ),
    "nuclear_norm": Metric(lambda e: float(e.values.sum()), _WEIGHTS, "Σσ", "Fazel 2002"),
    "stable_rank": Metric(
        lambda e: e.sum_squares,
        _DIRECTIONS,
        "Σσ²/σ₁²",
        "Rudelson & Vershynin 2007",
    ),
    "effective_rank": Metric(lambda e: entropy_rank(e.values), _DIRECTIONS, "exp H(p), p = σ/Σσ", _ROY),
    "energy_effective_rank": Metric(lambda e: entropy_rank(e.squares), _DIRECTIONS, "exp H(p), p = σ²/Σσ²", _ROY),
    "participation_ratio": Metric(
        lambda e: 0.0 if e.zero else e.sum_squares**2 / float((e.squares**2).sum()),
        _DIRECTIONS,
        "(Σσ²)²/Σσ⁴",
        "Bell & Dean 1970",
    ),
    "rank_90": Metric(lambda e: energy_rank(e.squares, 0.90), _DIRECTIONS, "least k: Σ_{i≤k}σ² ≥ 0.90 Σσ²", _BIDERMAN),
    "rank_95": Metric(lambda e: energy_rank(e.squares, 0.95), _DIRECTIONS, "least k: Σ_{i≤k}σ² ≥ 0.95 Σσ²", _BIDERMAN),
    "rank_99": Metric(lambda e: energy_rank(e.squares, 0.99), _DIRECTIONS, "least k: Σ_{i≤k}σ² ≥ 0.99 Σσ²", _BIDERMAN),
    "numerical_rank": Metric(numerical_rank, _DIRECTIONS, "#{σ > max(d_out, d_in)·eps·σ₁}", "NumPy matrix_rank"),
    "rank_90_null": Metric(lambda e: null_rank(*e.shape), _DIRECTIONS, "rank_90 of noise of this shape", _LAW),
    "rank_90_ratio": Metric(
        lambda e: _ratio(energy_rank(e.squares, 0.90), null_rank(*e.shape)), _ONE, "rank_90/rank_90_null", _LAW
    ),
    "effective_rank_null": Metric(
        lambda e: null_effective_rank(*e.shape), _DIRECTIONS, "effective_rank of noise of this shape", _LAW
    ),
    "effective_rank_ratio": Metric(
        lambda e: _ratio(entropy_rank(e.values), null_effective_rank(*e.shape)),
        _ONE,
        "effective_rank/effective_rank_null",
        _LAW,
    ),
    "unchanged_fraction": Metric(
        lambda e: e.rounding.unchanged if e.rounding else None, _ONE, "share of elements with ΔW = 0", _STORE
    ),
    "update_to_ulp": Metric(update_to_ulp, _ONE, "rms(ΔW)/rms(ulp(W_tuned))", _STORE),
    "rounding_edge": Metric(rounding_edge, _WEIGHTS, "√max_i Σ_j v_ij + √max_j Σ_i v_ij, v = ulp²/12", _STORE),
    "rank_above_rounding": Metric(rank_above_rounding, _DIRECTIONS, "#{σ > rounding_edge}", _STORE),
    "energy_above_rounding": Metric(energy_above_rounding, _ONE, "Σ_{σ > rounding_edge}σ² / Σσ²", _STORE),
    "resolved": Metric(resolved, "truth value", "rank_above_rounding > 0 and Σ ulp²/12 < 0.1 ‖ΔW‖²", _STORE),
    "noise_sigma": Metric(lambda e: e.noise, _WEIGHTS, "median(σ)/√(N μ_β)", _GAVISH),
    "rank_above_noise": Metric(rank_above_noise, _DIRECTIONS, "#{σ > σ₁ of noise at 99 %}", _GAVISH),
}


def measure(evidence: Evidence) -> dict[str, Value]:
    """Compute every metric of METRICS, in its order; None where a metric does not apply.

    Parameters
    ----------
    evidence : Evidence

    Returns
    -------
    dict
        Name → number or truth value, in the unit that METRICS gives.

    Examples
    --------
    >>> import torch
    >>> from deltaspec.types import Spectrum
    >>> spectrum = Spectrum(torch.tensor([4.0, 3.0]).double(), (2, 2), 25.0, "by hand", 0.0)
    >>> found = measure(Evidence(spectrum, base_norm=50.0))
    >>> found["frobenius_norm"], found["relative_norm"], found["stable_rank"], found["rank_90"]
    (5.0, 0.1, 1.5625, 2)
    """
    return {name: metric.function(evidence) for name, metric in METRICS.items()}
