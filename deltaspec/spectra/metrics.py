"""METRICS: every number deltaspec reports of a matrix; their names are the columns of every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from deltaspec.spectra.noise import Vector, edge_of_rounding, noise_edge, noise_sigma
from deltaspec.spectra.nulls import null_effective_rank, null_rank
from deltaspec.types import Rounding, Spectrum

Value = float | int | bool | None
ROUNDING_SHARE = 0.1  # rank_90 leaves out 10 % of the energy: more rounding than that, and it counts rounding


class Evidence:
    """All that metrics are computed from: a spectrum, the base's norm and the rounding of the stored delta.

    Parameters
    ----------
    spectrum : Spectrum
    base_norm : float or None
        ‖W_base‖_F; None for base and tuned spectra.
    rounding : Rounding or None
        None where no storage rounding enters the matrix: base and tuned spectra.
    unrounded : bool
        The delta comes from an adapter's own parameters, so no rounding of stored weights is in it.
    """

    def __init__(
        self,
        spectrum: Spectrum,
        *,
        base_norm: float | None = None,
        rounding: Rounding | None = None,
        unrounded: bool = False,
    ) -> None:
        self.values: Vector = spectrum.singular_values.numpy()
        self.shape = spectrum.shape
        self.error_bound = spectrum.error_bound
        self.energy = spectrum.energy
        self.norm = float(np.sqrt(spectrum.energy))
        top = float(self.values[0]) if self.values.size else 0.0
        self.zero = top == 0.0  # every rank is 0, and there is nothing to resolve
        # Relative to σ₁², so that no power of a tiny value underflows.
        self.squares: Vector = (self.values / top) ** 2 if top else np.zeros_like(self.values)
        self.sum_squares = float(self.squares.sum())
        self.base_norm, self.rounding, self.unrounded = base_norm, rounding, unrounded
        self.noise = noise_sigma(self.values, *self.shape)

    def above(self, edge: float) -> int:
        """Count the singular values above ``edge``."""
        return int((self.values > edge).sum())


@dataclass(frozen=True, slots=True)
class Metric:
    """One column: its function, unit, formula and source."""

    function: Callable[[Evidence], Value]
    unit: str
    formula: str
    reference: str


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
    >>> spectrum = Spectrum(torch.tensor([4.0, 3.0]).double(), (2, 2), 25.0, "by hand", 0.0)
    >>> found = measure(Evidence(spectrum, base_norm=50.0))
    >>> found["frobenius_norm"], found["relative_norm"], found["stable_rank"], found["rank_90"]
    (5.0, 0.1, 1.5625, 2)
    """
    return {name: metric.function(evidence) for name, metric in METRICS.items()}
