"""What a basis is found to capture: diagonal matrices, whose every figure has a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltaspec.linalg.certificate import Subspace, certify
from deltaspec.linalg.streamed import Streamed
from deltaspec.types import Spectrum
from tests.linalg.test_svd import in_blocks

SHAPES = [(7, 4), (4, 7), (5, 5)]
EPS = 2.0**-52


def turned(side, angle, towards=1):
    """The first axis, turned by an angle towards another: a basis of one row."""
    basis = torch.zeros(1, side, dtype=torch.float64)
    basis[0, 0], basis[0, towards] = math.cos(angle), math.sin(angle)
    return basis


def diagonal(shape, values):
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return matrix


def certified(matrix, basis, *, next_value, spectrum=None):
    streamed = Streamed(in_blocks(matrix, 3), tuple(matrix.shape), torch.device("cpu"))
    energy = float(matrix.square().sum())
    return certify(streamed, Subspace(basis, next_value), energy=energy, method="test", spectrum=spectrum)


def estimate(values, angle):
    """The excess that one Ritz vector promises: half its gain over the residual, the gain from a 2 × 2 eigenproblem."""
    first, second = values[0] ** 2, values[1] ** 2
    ritz = first * math.cos(angle) ** 2 + second * math.sin(angle) ** 2
    coupling = (first - second) * math.sin(angle) * math.cos(angle)
    half = math.hypot(ritz - second, 2 * coupling) - (ritz - second)
    return half / 2 / (sum(value**2 for value in values) - ritz) / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("angle", [1e-4, 1e-3, 3e-3])
def test_the_excess_of_a_turned_vector_is_its_gain_over_the_residual_halved(shape, angle):
    values = [1.0, 0.5, 0.3, 0.2]
    found = certified(diagonal(shape, values), turned(4 if 4 in shape else 5, angle), next_value=0.25)
    captured = math.cos(angle) ** 2 + 0.25 * math.sin(angle) ** 2
    energy = sum(value**2 for value in values)
    assert found.singular_values.item() == pytest.approx(math.sqrt(captured), rel=1e-14, abs=0)
    assert found.residual == pytest.approx(energy - captured, rel=1e-13, abs=0)
    assert found.excess == pytest.approx(estimate(values, angle), rel=1e-6, abs=0)
    truth = math.sqrt((energy - captured) / (energy - 1)) - 1
    assert found.excess == pytest.approx(truth, rel=1e-3, abs=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_basis_too_coarse_is_turned_once_more(shape):
    """A power step divides the tangent by (σ₁/σ₂)²; what is still too coarse then is no result."""
    values = [1.0, 0.1, 0.05, 0.02]
    side = min(shape)
    assert estimate(values, 0.02) > 1e-3
    found = certified(diagonal(shape, values), turned(side, 0.02), next_value=0.01)
    angle = math.atan(0.01 * math.tan(0.02))
    near = found.right if shape[0] >= shape[1] else found.left
    assert near[1, 0] / near[0, 0] == pytest.approx(math.tan(angle), rel=1e-9, abs=0)
    assert found.excess == pytest.approx(estimate(values, angle), rel=1e-6, abs=0)
    assert certified(diagonal(shape, values), turned(side, 0.3), next_value=0.01) is None


@pytest.mark.parametrize("angle", [1e-3, 8e-3, 0.2])
def test_with_all_values_known_the_excess_is_the_true_one(angle):
    """Up to 1e-4 of it is a result at once; the estimate's lower limit holds only where it is an estimate."""
    values = [1.0, 0.5, 0.3, 0.2]
    matrix = diagonal((7, 4), values)
    spectrum = Spectrum(torch.tensor(values, dtype=torch.float64), (7, 4), 1.38, "qr+svd64", 1e-15)
    found = certified(matrix, turned(4, angle), next_value=0.25, spectrum=spectrum)

    def excess(angle):
        return math.sqrt((0.38 + 0.75 * math.sin(angle) ** 2) / 0.38) - 1

    if angle > 0.1:  # a power step leaves an angle of .05
        assert excess(math.atan(0.25 * math.tan(angle))) > 1e-4
        assert found is None
    else:
        assert 0 < excess(angle) < 1e-4
        assert found.excess == pytest.approx(excess(angle), rel=1e-8, abs=0)
        assert torch.equal(found.values, spectrum.singular_values)


def test_a_residual_of_rounding_is_no_excess():
    matrix = diagonal((7, 4), [1.0, 0.5 * 7 * EPS])
    found = certified(matrix, turned(4, 0.0), next_value=0.0)
    assert (found.excess, found.method) == (0.0, "test")
    assert found.residual == pytest.approx((0.5 * 7 * EPS) ** 2, rel=1e-9, abs=0)


def test_a_small_residual_is_summed_from_elements():
    """energy - Σσ² has no digit of it left."""
    values = [1.0, *np.geomspace(1e-9, 1e-10, 3)]
    found = certified(diagonal((7, 4), values), turned(4, 0.0), next_value=1e-18)
    assert found.residual == pytest.approx(sum(value**2 for value in values[1:]), rel=1e-12, abs=0)
