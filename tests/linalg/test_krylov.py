"""The iteration alone: what it finds, when it stops, and what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltaspec.linalg import krylov
from deltaspec.linalg.krylov import promised_energy, top_subspace
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.truncated import truncate
from tests.linalg.test_svd import in_blocks, with_spectrum
from tests.linalg.test_truncated import SPECTRA

HARD = ["slow power law", "flat", "pairs and triples", "spikes above noise", "twelve decades"]


def captured(matrix, basis):
    return float((matrix @ basis.mT).square().sum())


@pytest.mark.parametrize("rank", [1, 7, 30])
@pytest.mark.parametrize("spectrum", HARD)
def test_it_captures_what_numpy_says_can_be_captured(spectrum, rank):
    matrix = with_spectrum((600, 480), SPECTRA[spectrum](480))
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    basis, next_value = top_subspace(matrix.float(), rank, energy=exact.sum(), seed=0)
    assert torch.allclose(basis @ basis.mT, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    residual, optimum = exact.sum() - captured(matrix, basis), exact[rank:].sum()
    assert residual <= optimum * (1 + 2e-4)
    assert 0.9 * exact[rank] <= next_value <= exact[rank] * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_what_it_promises_is_not_less_than_what_is_missing(seed, monkeypatch):
    """Stopped after every possible block: once the promise is small, the truth is not far above it."""
    matrix = with_spectrum((512, 512), SPECTRA[HARD[seed % len(HARD)]](512), seed=seed)
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    for goal in 10.0 ** -np.arange(2, 7):
        monkeypatch.setattr(krylov, "GOAL", goal)
        basis, _ = top_subspace(matrix.float(), 16, energy=exact.sum(), seed=seed)
        missing = (exact[:16].sum() - captured(matrix, basis)) / exact[16:].sum() / 2
        assert missing <= max(2 * goal, 3e-8) if goal <= 1e-4 else missing < 0.1


@pytest.mark.parametrize("top", [0.3, 1.0, 3.0])
def test_a_direction_that_the_start_does_not_see_is_found(top):
    """One of the top singular vectors, orthogonal to the sketch and to everything that D maps the sketch to."""
    long, side, rank = 400, 320, 8
    width = 8 * math.ceil((rank / 2 + 4) / 8)
    sketch = torch.randn(width - 1, long, generator=torch.Generator().manual_seed(3)).double()
    unseen = torch.linalg.qr(torch.cat([sketch, torch.ones(1, long, dtype=torch.float64)]).mT).Q[:, -1]
    assert float((sketch @ unseen).abs().max()) < 1e-12
    rest = with_spectrum((long, side), np.r_[np.geomspace(1, 0.1, 12), np.linspace(1e-2, 1e-3, side - 12)])
    rest -= torch.outer(unseen, unseen @ rest)
    direction = torch.linalg.svd(rest).Vh[-1]
    matrix = rest - torch.outer(rest @ direction, direction) + top * torch.outer(unseen, direction)
    found = truncate(Streamed(in_blocks(matrix), (long, side), torch.device("cpu")), rank=rank, seed=3)
    assert found.method == "krylov32"
    assert float((found.singular_values - top).abs().min()) < 1e-4
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert found.residual == pytest.approx((exact[rank:] ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_a_matrix_with_few_directions_ends_the_iteration(true_rank):
    values = np.r_[np.arange(true_rank, 0, -1.0), np.zeros(320 - true_rank)]
    matrix = with_spectrum((320, 320), values).float()
    found = top_subspace(matrix, 8, energy=float(max((values**2).sum(), 1e-30)), seed=0)
    if true_rank == 0:
        assert found is None or captured(matrix.double(), found[0]) == 0
    else:
        assert captured(matrix.double(), found[0]) == pytest.approx((values**2).sum(), rel=1e-6)


def test_products_beyond_float32_give_nothing():
    matrix = torch.full((320, 320), float("inf"))
    assert top_subspace(matrix, 4, energy=1e200, seed=0) is None


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.999, 1.5])
@pytest.mark.parametrize("rho", [0.0, 1e-9, 0.3])
def test_the_promise_is_that_of_a_two_by_two_matrix(mu, rho):
    top = np.linalg.eigvalsh(np.array([[1.0, rho], [rho, mu]]))[-1]
    found = promised_energy(torch.tensor([1.0]).double(), torch.tensor([rho]).double(), mu)
    assert found == pytest.approx(top - 1, rel=1e-6, abs=1e-15)
    if rho == 1e-9 and mu < 0.9:
        assert found == pytest.approx(rho**2 / (1 - mu), rel=1e-9)  # where eigvalsh sees nothing
