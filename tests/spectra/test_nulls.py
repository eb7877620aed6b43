"""Noise nulls against simulation, published counts, and the law integrated another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import airy

from deltaspec.spectra.noise import TRACY_WIDOM_99, noise_edge, noise_sigma
from deltaspec.spectra.nulls import median_of_law, null_effective_rank, null_rank, null_singular_values
from tests.oracle.reference import energy_rank, entropy_rank, integral, law, nulls

SHAPES = [(200, 200), (100, 300), (256, 64), (300, 250)]


def simulate(shape, count=12):
    rng = np.random.default_rng(0)
    return [np.linalg.svd(rng.standard_normal(shape), compute_uv=False) for _ in range(count)]


def test_published_counts():
    """METHODS: 4096² needs 2088 directions, 4096 × 11008 needs 2916, ratio-4 MLPs 76.1 %."""
    assert null_rank(4096, 4096) == 2088
    assert null_rank(4096, 11008) == null_rank(11008, 4096) == 2916
    assert null_rank(4096, 16384) / 4096 == pytest.approx(0.761, abs=5e-4)
    assert null_effective_rank(4096, 4096) / 4096 == pytest.approx(0.805, abs=5e-4)


@pytest.mark.parametrize(("beta", "median"), [(1.0, 0.6528), (0.372, 0.8745), (0.25, 0.9160)])
def test_published_medians(beta, median):
    assert median_of_law(round(1000 * beta), 1000) == pytest.approx(median, abs=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1024), (2, 3), (7, 7)])
def test_the_law_integrated_in_another_variable(shape):
    rank, effective, median = nulls(*shape)
    assert null_rank(*shape) == max(1, round(rank))
    assert null_effective_rank(*shape) == pytest.approx(effective, rel=1e-6)
    assert median_of_law(*shape) == pytest.approx(median, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 7), (8, 40), (64, 64), (300, 250)])
def test_expected_values_are_quantiles_at_the_middle_of_each_share(shape):
    """σ_i = √(N·x) with a share (i + ½)/side of the law above x, by adaptive integration and root finding."""
    side, length = min(shape), max(shape)
    density, _, high = law(side / length)
    expected = null_singular_values(*shape)
    last = {side - 2, side - 1} if side < 0.9 * length else set()  # a square's density has a pole at zero
    for i in ({0, 1, side // 3, side // 2} | last) & set(range(side)):
        share = integral(density, expected[i] ** 2 / length, high)
        assert share == pytest.approx((i + 0.5) / side, abs=4e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_simulated_noise_scores_its_null(shape):
    spectra = simulate(shape)
    assert np.mean([energy_rank(s**2, 0.9) for s in spectra]) == pytest.approx(null_rank(*shape), abs=1)
    assert np.mean([entropy_rank(s) for s in spectra]) == pytest.approx(null_effective_rank(*shape), rel=5e-3)
    expected = null_singular_values(*shape)
    assert expected.shape == (min(shape),)
    assert (np.diff(expected) <= 0).all()
    assert abs(np.mean(spectra, axis=0) - expected).max() < 0.02 * expected[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [1.0, 3e-5])
def test_noise_of_unknown_size_is_measured_under_a_few_spikes(shape, sigma):
    """The median gives σ within 3 %; five spikes over the edge are counted, noise is not."""
    rng = np.random.default_rng(1)
    noise = sigma * rng.standard_normal(shape)
    clean = np.linalg.svd(noise, compute_uv=False)
    found = noise_sigma(clean, *shape)
    assert found == pytest.approx(sigma, rel=0.03)
    assert (clean > noise_edge(found, *shape)).sum() == 0
    u, v = (np.linalg.qr(rng.standard_normal((d, 5)))[0] for d in shape)
    edge = sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    spiked = np.linalg.svd(noise + 2 * edge * u @ v.T, compute_uv=False)
    assert (spiked > noise_edge(noise_sigma(spiked, *shape), *shape)).sum() == 5


def test_noise_exceeds_its_edge_about_once_in_a_hundred():
    shape, above = (60, 90), 0
    rng = np.random.default_rng(2)
    for _ in range(400):
        above += np.linalg.svd(rng.standard_normal(shape), compute_uv=False)[0] > noise_edge(1.0, *shape)
    assert 0 <= above <= 12


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (1, 2), (5, 5), (4096, 1024)])
def test_the_edge_is_johnstones_centre_and_scale(shape):
    """σ₁² of noise is μ + s·TW₁; here both written out as in the paper, for n = N and p = a."""
    n, p = max(shape), min(shape)
    mu = (np.sqrt(n - 1) + np.sqrt(p)) ** 2
    scale = (np.sqrt(n - 1) + np.sqrt(p)) * np.cbrt(1 / np.sqrt(n - 1) + 1 / np.sqrt(p))
    assert noise_edge(0.3, *shape) == pytest.approx(0.3 * np.sqrt(mu + 2.0234 * scale), rel=1e-12)


def test_99_in_100_of_the_tracy_widom_law_lie_below_its_quantile():
    """F₁(s) = exp(-½∫(q + (x - s)q²)dx) from s up, q the solution of Painlevé II that falls like Airy's function."""
    start = 8.0

    def slope(x, y):  # q, q', ∫(x - s)q² with its own slope ∫q², ∫q; all from x up
        return [y[1], x * y[0] + 2 * y[0] ** 3, -y[3], -(y[0] ** 2), -y[0]]

    ai, derivative, _, _ = airy(start)
    first = [ai, derivative, 0.0, 0.0, 0.0]
    y = solve_ivp(slope, (start, TRACY_WIDOM_99), first, rtol=1e-10, atol=1e-14).y[:, -1]
    assert math.exp(-(y[2] + y[4]) / 2) == pytest.approx(0.99, abs=2e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_shapes_without_a_law(shape):
    """Nothing for an empty matrix; one number is its own edge, twice over."""
    side = min(shape)
    assert noise_sigma(np.zeros(side), *shape) == 0.0
    assert noise_edge(2.0, *shape) == 2.0 * (math.sqrt(side) + math.sqrt(max(shape)))
    assert (null_rank(*shape), null_effective_rank(*shape)) == (side, float(side))
    assert null_singular_values(*shape).shape == (side,)


def test_sigma_is_the_median_over_that_of_the_law():
    """Missing values of a low-rank source are zeros; a median of an even count is the mean of two."""
    _, _, median = nulls(4, 10)
    assert noise_sigma(np.array([5.0, 3.0, 2.0]), 4, 10) == pytest.approx(2.5 / math.sqrt(10 * median), rel=1e-6)
    assert noise_sigma(np.array([5.0, 3.0, 2.0]), 10, 4) == pytest.approx(2.5 / math.sqrt(10 * median), rel=1e-6)
    assert noise_sigma(np.array([7.0]), 1, 1) == pytest.approx(7.0 / math.sqrt(nulls(1, 1)[2]), rel=1e-6)


def test_exact_low_rank_has_no_noise():
    assert noise_sigma(np.array([3.0, 2.0]), 50, 40) == 0.0
    assert noise_edge(0.0, 50, 40) == 0.0
