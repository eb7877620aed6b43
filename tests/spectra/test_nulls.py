"""Noise nulls against simulation, published counts, and the law integrated another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaspec.spectra.noise import noise_edge, noise_sigma
from deltaspec.spectra.nulls import median_of_law, null_effective_rank, null_rank, null_singular_values
from tests.oracle.reference import energy_rank, entropy_rank, nulls

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


def test_exact_low_rank_has_no_noise():
    assert noise_sigma(np.array([3.0, 2.0]), 50, 40) == 0.0
    assert noise_edge(0.0, 50, 40) == 0.0
