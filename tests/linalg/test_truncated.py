"""The top r triplets against NumPy's float64 SVD: spectra × shapes × ranks × routes, and an honest excess."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import NumericalError
from deltaspec.linalg import routes, truncated
from deltaspec.linalg.openblas import find_openblas
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.truncated import truncate, truncate_product
from tests.linalg.test_svd import in_blocks, with_spectrum

CPU = torch.device("cpu")
SHAPES = [(320, 320), (700, 300), (300, 700), (90, 60), (60, 90)]
SPECTRA = {
    "power law": lambda n: np.arange(1, n + 1.0) ** -1,
    "slow power law": lambda n: np.arange(1, n + 1.0) ** -0.3,
    "flat": lambda n: np.linspace(1, 0.01, n),
    "all equal": lambda n: np.ones(n),
    "pairs and triples": lambda n: np.repeat(np.geomspace(1, 0.1, n // 3 + 1), 3)[:n],
    "spikes above noise": lambda n: np.r_[np.geomspace(5, 1.3, 12), np.linspace(1, 0.01, n - 12)],
    "thirty equal": lambda n: np.r_[np.ones(30), np.linspace(0.5, 0.1, n - 30)],
    "cluster at the cut": lambda n: np.r_[np.full(n // 2, 1 + 1e-9), np.full(n - n // 2, 1.0)],
    "twelve decades": lambda n: np.geomspace(1, 1e-12, n),
    "ten spikes, float32 rounding": lambda n: np.r_[np.geomspace(1, 0.3, 10), np.full(n - 10, 1e-7)],
    "rank five": lambda n: np.r_[np.geomspace(1, 0.2, 5), np.zeros(n - 5)],
}
RANKS = {"2": lambda n: 2, "8": lambda n: 8, "side/16": lambda n: n // 16, "side/3": lambda n: n // 3}


def check(matrix, found, rank):
    """Compare with NumPy: orthonormal, exact residual, true excess within what is reported and below 1e-4."""
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    eps = max(matrix.shape) * np.finfo(float).eps
    top = exact[0]
    k = len(found.singular_values)
    assert k == min(rank, int((exact > eps * top).sum()))
    for side in (found.left, found.right):
        assert side.dtype == torch.float64
        assert side.is_contiguous()
        assert torch.allclose(side.mT @ side, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert (found.left.shape, found.right.shape) == ((matrix.shape[0], k), (matrix.shape[1], k))
    assert found.shape == tuple(matrix.shape)
    assert found.energy == pytest.approx((exact**2).sum(), rel=1e-13)
    values = found.singular_values.numpy()
    assert (np.diff(values) <= 0).all()
    assert (values <= exact[:k] * (1 + 1e-12) + 1e-15 * top).all()  # a projection captures no more
    error = float((matrix - (found.left * found.singular_values) @ found.right.mT).norm())
    rounding = eps * math.sqrt(found.energy)
    assert math.sqrt(found.residual) == pytest.approx(error, rel=1e-6, abs=rounding)
    optimum = math.sqrt((exact[rank:] ** 2).sum())
    assert found.excess <= 1e-4
    assert error <= optimum * (1 + max(1.1 * found.excess, 1e-6)) + rounding
    assert error <= optimum * (1 + 1e-4) + rounding
    assert (found.right.gather(0, found.right.abs().argmax(0, keepdim=True)) > 0).all()
    if found.values is not None:
        assert np.allclose(found.values.numpy(), exact, rtol=0, atol=1e-6 * top)
        if optimum > 1e4 * rounding:
            assert 1 + found.excess == pytest.approx(max(error / optimum, 1), rel=1e-7)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_spectrum_is_cut_at_its_optimum(shape, spectrum, rank):
    matrix = with_spectrum(shape, SPECTRA[spectrum](min(shape)))
    rank = RANKS[rank](min(shape))
    check(matrix, truncate(Streamed(in_blocks(matrix), shape, CPU), rank=rank), rank)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("large", [False, True])
def test_a_policy_sees_all_values_and_the_excess_is_exact(spectrum, large, monkeypatch):
    if large:
        monkeypatch.setattr(truncated, "LARGE", 300)
    matrix = with_spectrum((400, 320), SPECTRA[spectrum](320))
    seen = []

    def seven(values):
        seen.append(values)
        return 7

    found = truncate(Streamed(in_blocks(matrix), (400, 320), CPU), rank=seven)
    check(matrix, found, 7)
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert all(np.allclose(values.numpy(), exact, atol=1e-6 * exact[0]) for values in seen)
    assert np.allclose(found.values.numpy(), exact, atol=1e-6 * exact[0])
    if large and spectrum == "power law":
        assert found.method.endswith("+krylov32")


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2), (40, 40), (257, 256)], ids=str)
def test_small_shapes_at_every_rank(shape):
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    for rank in {0, 1, min(shape) // 2, min(shape), min(shape) + 3}:
        found = truncate(Streamed(in_blocks(matrix), shape, CPU), rank=rank)
        if rank:
            check(matrix, found, min(rank, min(shape)))
        else:
            assert (found.left.shape, found.right.shape) == ((shape[0], 0), (shape[1], 0))
            assert found.energy == found.residual == pytest.approx(float((matrix**2).sum()))
            assert found.excess == 0


ROUTES_TAKEN = {
    "krylov32": {"rank": 4},
    "gram64+onestage": {"rank": 100},
    "gram64+onestage, policy": {"rank": lambda values: 4},
    "gram64+onestage, memory": {"rank": 4, "memory": 4 * 300 * 280 - 1},
}


@pytest.mark.parametrize("route", ROUTES_TAKEN)
def test_each_route_is_taken_where_it_should_be(route):
    matrix = with_spectrum((300, 280), SPECTRA["power law"](280))
    found = truncate(Streamed(in_blocks(matrix), (300, 280), CPU), **ROUTES_TAKEN[route])
    assert found.method == route.split(",")[0]
    assert (found.values is None) == (route == "krylov32")


def test_the_first_value_left_out_is_what_the_estimate_reckons_with():
    """A tail too small to be known from the Gram matrix: taking the last value kept for the next would leave no gap."""
    matrix = with_spectrum((90, 60), np.r_[np.geomspace(1, 1e-3, 20), np.full(40, 1e-8)])
    found = truncate(Streamed(in_blocks(matrix), (90, 60), CPU), rank=20)
    check(matrix, found, 20)
    assert found.method == "gram64+onestage"
    assert found.excess < 1e-9


@pytest.mark.parametrize("shape", [(100, 40), (40, 100)])
@pytest.mark.parametrize("rank", [31, 40, lambda values: 31])
def test_values_that_drown_are_neither_kept_nor_missed(shape, rank):
    """Thirty values just below d·eps·σ₁: together more than rounding, and none of them a direction."""
    matrix = torch.zeros(shape, dtype=torch.float64)
    matrix.diagonal()[:31] = 0.9 * 100 * 2.0**-52
    matrix[0, 0] = 1.0
    found = truncate(Streamed(in_blocks(matrix), shape, CPU), rank=rank)
    check(matrix, found, 1)
    assert found.method == "qr+svd64"
    assert found.residual == pytest.approx(30 * (0.9 * 100 * 2.0**-52) ** 2, rel=1e-6, abs=0)


@pytest.mark.parametrize("rank", [1, 4, 90])
def test_without_openblas_torch_serves(rank, monkeypatch):
    monkeypatch.setattr(routes, "find_openblas", lambda: None)
    matrix = with_spectrum((100, 90), SPECTRA["power law"](90))
    found = truncate(Streamed(in_blocks(matrix), (100, 90), CPU), rank=rank)
    assert found.method == "gram64+eigh"
    check(matrix, found, rank)


@pytest.mark.parametrize("exponent", [-30, 30, -140, 60])
@pytest.mark.parametrize("rank", [6, 60])
def test_scale_does_not_matter(exponent, rank):
    matrix = with_spectrum((320, 300), SPECTRA["spikes above noise"](300)) * 10.0**exponent
    check(matrix, truncate(Streamed(in_blocks(matrix), (320, 300), CPU), rank=rank), rank)


@pytest.mark.parametrize("rank", [6, 60, lambda values: 6])
def test_block_sizes_do_not_matter_and_a_seed_decides(rank):
    matrix = with_spectrum((500, 320), SPECTRA["spikes above noise"](320))
    runs = [truncate(Streamed(in_blocks(matrix, step), (500, 320), CPU), rank=rank) for step in (500, 500, 77, 1)]
    assert torch.equal(runs[0].left, runs[1].left)
    assert torch.equal(runs[0].right, runs[1].right)
    for run in runs[2:]:
        assert torch.allclose(run.singular_values, runs[0].singular_values, rtol=1e-9)
        assert torch.allclose(run.left, runs[0].left, atol=1e-5)
    other = truncate(Streamed(in_blocks(matrix), (500, 320), CPU), rank=rank, seed=1)
    promised = 2 * max(other.excess, runs[0].excess) * other.residual  # energy that either may miss
    gained = (other.singular_values.square() - runs[0].singular_values.square()).abs().sum()
    assert 0 < float(gained) <= promised + 1e-12 * other.energy


@pytest.mark.parametrize("wrong", ["another singular vector", "one turned a little"])
def test_a_basis_that_is_no_good_is_refused(wrong, monkeypatch):
    """An iteration that returns anything else than the top subspace must not become a result."""
    matrix = with_spectrum((320, 300), SPECTRA["power law"](300))
    vectors = torch.from_numpy(np.linalg.svd(matrix.numpy())[2])
    basis = vectors[:6].clone()
    basis[5] = vectors[6] if wrong.startswith("another") else 0.98 * vectors[5] + math.sqrt(1 - 0.98**2) * vectors[7]
    monkeypatch.setattr(truncated, "top_subspace", lambda *_, **__: (basis, 1 / 49 + 1e-3))
    found = truncate(Streamed(in_blocks(matrix), (320, 300), CPU), rank=6)
    assert found.method == "gram64+onestage"
    check(matrix, found, 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [0, 4, 100, lambda values: 4])
def test_non_finite_values_are_refused(bad, rank):
    matrix = torch.ones(300, 280, dtype=torch.float64)
    matrix[299, 2] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        truncate(Streamed(in_blocks(matrix), (300, 280), CPU), rank=rank)


@pytest.mark.parametrize("rank", [0, 4, 100, lambda values: 4])
def test_a_zero_matrix_has_rank_zero(rank):
    found = truncate(Streamed(in_blocks(torch.zeros(300, 280, dtype=torch.float64)), (300, 280), CPU), rank=rank)
    assert (found.method, found.energy, found.residual, found.excess) == ("zero", 0.0, 0.0, 0.0)
    assert (found.left.shape, found.right.shape) == ((300, 0), (280, 0))


def test_an_empty_matrix_has_rank_zero():
    assert truncate(Streamed(lambda: iter(()), (0, 7), CPU), rank=4).left.shape == (0, 0)


def test_a_policy_may_choose_nothing():
    matrix = with_spectrum((300, 280), SPECTRA["flat"](280))
    found = truncate(Streamed(in_blocks(matrix), (300, 280), CPU), rank=lambda values: 0)
    assert found.left.shape == (300, 0)
    assert len(found.values) == 280
    assert found.residual == found.energy > 0


@pytest.mark.parametrize("side", [1, 2, 3, 63, 64, 130])
@pytest.mark.parametrize("kind", ["random", "identity"])
def test_top_eigenvectors_from_one_reduction(side, kind):
    rng = np.random.default_rng(side)
    basis, _ = np.linalg.qr(rng.standard_normal((side, side)))
    values = np.sort(rng.random(side)) if kind == "random" else np.ones(side)
    symmetric = basis * values @ basis.T
    reduced = find_openblas().tridiagonal(np.triu(symmetric))
    assert np.allclose(reduced.eigenvalues(), values, atol=1e-13)
    for count in {1, side // 2 or 1, side}:
        vectors = reduced.eigenvectors(count)
        assert np.allclose(vectors @ vectors.T, np.eye(count), atol=1e-11)
        assert np.allclose(vectors @ symmetric, values[::-1][:count, None] * vectors, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 9), st.integers(0, 99))
def test_factors_are_cut_as_their_product(d_out, d_in, k, rank, seed):
    rng = np.random.default_rng(seed)
    b, a = torch.from_numpy(rng.standard_normal((d_out, k))), torch.from_numpy(rng.standard_normal((k, d_in)))
    exact = np.linalg.svd((b @ a).numpy(), compute_uv=False)
    found = truncate_product(b, a, rank=rank)
    kept = min(rank, k, d_out, d_in)
    assert len(found.singular_values) == kept
    assert found.energy == pytest.approx((exact**2).sum())
    left = float(((b @ a) - (found.left * found.singular_values) @ found.right.mT).square().sum())
    assert found.residual == pytest.approx(left, abs=1e-12 * found.energy)
    assert left == pytest.approx((exact[kept:] ** 2).sum(), abs=1e-12 * found.energy)
    assert np.allclose(found.values.numpy(), exact[: len(found.values)], atol=1e-11)
    policy = truncate_product(b, a, rank=lambda values: int((values > 0.5 * values[0]).sum()))
    assert len(policy.singular_values) == int((exact > 0.5 * exact[0]).sum())


def test_factors_that_cancel_or_are_empty_give_rank_zero_and_nan_is_refused():
    b, a = torch.randn(9, 2, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    for found in (
        truncate_product(torch.cat([b, -b], 1), torch.cat([a, a]), rank=2),
        truncate_product(torch.zeros_like(b), a, rank=2),
        truncate_product(b[:, :0], a[:0], rank=2),
    ):
        assert (found.method, found.energy, found.left.shape, found.right.shape) == ("zero", 0.0, (9, 0), (7, 0))
    with pytest.raises(NumericalError, match="NaN or infinity"):
        truncate_product(b * float("nan"), a, rank=1)


@pytest.mark.parametrize(("device", "most"), [("cpu", 40), ("cuda", 10)])
def test_each_device_iterates_for_few_directions_only(device, most, monkeypatch):
    """Nothing is computed here: the reduction of a GPU overtakes its iteration at a quarter of the CPU's rank."""
    monkeypatch.setattr(truncated, "_by_iteration", lambda *_, **__: "iteration")
    monkeypatch.setattr(truncated, "_by_reduction", lambda *_: "reduction")
    for rank, way in ((most, "iteration"), (most + 1, "reduction")):
        assert truncate(Streamed(lambda: iter(()), (900, 640), torch.device(device)), rank=rank) == way


@pytest.mark.parametrize("switch", ["fp32_precision", "allow_tf32"])
def test_a_gpu_cuts_without_tf32_and_leaves_it_on(switch, monkeypatch):
    products, seen = torch.backends.cuda.matmul, []
    before = products.fp32_precision
    monkeypatch.setattr(truncated, "_by_iteration", lambda *_, **__: seen.append(products.fp32_precision) or seen)
    try:
        setattr(products, switch, "tf32" if switch == "fp32_precision" else True)
        for device in ("cuda", "cpu"):
            truncate(Streamed(lambda: iter(()), (900, 640), torch.device(device)), rank=4)
            assert products.fp32_precision == "tf32"
    finally:
        products.allow_tf32 = False
        products.fp32_precision = before
    assert seen == ["ieee", "tf32"]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 20, 100, lambda values: 8])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_gpu_cuts_at_the_same_place(spectrum, rank):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    for shape in ((320, 320), (300, 700)):
        matrix = with_spectrum(shape, SPECTRA[spectrum](min(shape)))
        device = torch.device("cuda")
        found = truncate(Streamed(in_blocks(matrix.to(device)), shape, device), rank=rank)
        check(matrix, found, 8 if callable(rank) else rank)
        assert found.left.device.type == found.right.device.type == "cpu"
