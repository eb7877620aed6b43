"""Every route against NumPy float64, and the certificate that guards them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import NumericalError
from deltaspec.linalg import gram as gram_room
from deltaspec.linalg import routes, svd
from deltaspec.linalg.gram import accumulate_gram, gram_energy
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.openblas import find_openblas
from deltaspec.linalg.routes import ROUTES, choose_route
from deltaspec.linalg.svd import decompose

CPU = torch.device("cpu")
SHAPES = [(1, 1), (1, 9), (9, 1), (40, 40), (130, 70), (70, 130), (257, 256)]
NEEDS = {
    "values": {},
    "vectors": {"vectors": 5},
    "exact": {"exact": True},
    "exact vectors": {"vectors": 5, "exact": True},
}


def in_blocks(matrix, step=50):
    """Blocks as a stream gives them: along the longer axis, each overwriting the last."""
    axis = 0 if matrix.shape[0] >= matrix.shape[1] else 1
    room = torch.empty_like(matrix.narrow(axis, 0, min(step, matrix.shape[axis]))).contiguous()

    def blocks():
        for start in range(0, matrix.shape[axis], step):
            length = min(step, matrix.shape[axis] - start)
            block = room.view(-1)[: length * matrix.shape[1 - axis]]
            block = block.view(length, -1) if axis == 0 else block.view(-1, length)
            block.copy_(matrix.narrow(axis, start, length))
            yield block
            block.fill_(float("nan"))

    return blocks


def with_spectrum(shape, values, seed=0):
    rng = np.random.default_rng(seed)
    side = min(shape)
    left, _ = np.linalg.qr(rng.standard_normal((shape[0], side)))
    right, _ = np.linalg.qr(rng.standard_normal((shape[1], side)))
    return torch.from_numpy(left * values @ right.T)


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_vectors_are_numpys(shape, need):
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    u, exact, vt = np.linalg.svd(matrix.numpy(), full_matrices=False)
    found, note = decompose(in_blocks(matrix), shape, device=CPU, **NEEDS[need])
    assert note == ""
    assert found.energy == pytest.approx((exact**2).sum(), rel=1e-14)
    values = found.singular_values.numpy()
    assert abs(values - exact).max() <= found.error_bound
    assert np.allclose(values, exact, rtol=1e-12, atol=1e-13 * exact[0])
    if "vectors" in NEEDS[need]:
        k = min(5, min(shape))
        assert found.left.shape == (shape[0], k)
        assert found.right.shape == (shape[1], k)
        kept = (found.left * found.singular_values[:k]) @ found.right.mT
        assert np.allclose(kept.numpy(), (u[:, :k] * exact[:k]) @ vt[:k], atol=1e-11)
        assert (found.right.gather(0, found.right.abs().argmax(0, keepdim=True)) > 0).all()
    else:
        assert found.left is None


@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (90, 90)])
@pytest.mark.parametrize("decades", [2, 6, 12])
def test_error_bounds_hold_where_values_fall_over_many_decades(shape, decades):
    """The Gram route loses small values, and its bound says by how much; the exact route keeps them."""
    planted = np.logspace(0, -decades, min(shape))
    matrix = with_spectrum(shape, planted)
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    gram, _ = decompose(in_blocks(matrix), shape, device=CPU)
    error = abs(gram.singular_values.numpy() - exact)
    assert error.max() <= gram.error_bound
    assert (error <= np.maximum(gram.error_bound**2 / exact, 1e-15)).all()
    full, _ = decompose(in_blocks(matrix), shape, device=CPU, exact=True)
    assert abs(full.singular_values.numpy() - exact).max() <= full.error_bound <= 1e-13


@pytest.mark.parametrize("method", ["gram64+numpy", "gram64+torch", "gram64+twostage"])
def test_all_eigensolvers_serve_the_same_values(method, monkeypatch):
    matrix = torch.from_numpy(np.random.default_rng(1).standard_normal((60, 50)))
    monkeypatch.setattr(svd, "choose_route", lambda *_: method)
    found, _ = decompose(in_blocks(matrix), (60, 50), device=CPU)
    assert found.method == method
    assert np.allclose(found.singular_values.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-12)


def test_a_missed_certificate_falls_back_and_says_so(monkeypatch):
    """A wrong eigenvalue that no exception reports must not become a result."""
    matrix = torch.from_numpy(np.random.default_rng(2).standard_normal((30, 20)))
    honest = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda g, UPLO: honest(g, UPLO) * (1 + 1e-9))
    found, note = decompose(in_blocks(matrix), (30, 20), device=CPU)
    assert found.method == "qr+svd64"
    assert "certificate" in note
    assert np.allclose(found.singular_values.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-12)


@pytest.mark.parametrize("broken", ["a value too large", "two values moved"])
def test_either_certificate_alone_catches_its_fault(broken, monkeypatch):
    """Moving two eigenvalues by the same amount keeps Σσ² and is seen in Σσ⁴ only."""
    matrix = torch.from_numpy(np.random.default_rng(2).standard_normal((30, 20)))
    honest = np.linalg.eigvalsh

    def wrong(gram, UPLO):
        values = honest(gram, UPLO)
        values[-1] *= 1 + 1e-6
        values[0] -= values[-1] * 1e-6 / (1 + 1e-6) if broken == "two values moved" else 0
        return values

    monkeypatch.setattr(np.linalg, "eigvalsh", wrong)
    assert decompose(in_blocks(matrix), (30, 20), device=CPU)[0].method == "qr+svd64"


def test_the_exact_route_has_a_certificate_too(monkeypatch):
    matrix = torch.from_numpy(np.random.default_rng(2).standard_normal((30, 20)))
    honest = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a, driver: honest(a) * 1.05)
    with pytest.raises(NumericalError, match="certificate"):
        decompose(in_blocks(matrix), (30, 20), device=CPU, exact=True)


@pytest.mark.parametrize("exact", [False, True])
def test_vectors_that_drown_in_the_bound_are_not_kept(exact):
    matrix = with_spectrum((40, 30), np.array([1.0, 0.5] + [0.0] * 28))
    found, _ = decompose(in_blocks(matrix), (40, 30), device=CPU, vectors=5, exact=exact)
    assert found.left.shape == (40, 2)
    assert torch.allclose(found.left.mT @ found.left, torch.eye(2, dtype=torch.float64), atol=1e-12)


def test_a_zero_matrix_is_zero_and_an_empty_one_empty():
    zero, _ = decompose(in_blocks(torch.zeros(6, 4, dtype=torch.float64)), (6, 4), device=CPU)
    assert (zero.energy, zero.singular_values.tolist(), zero.error_bound) == (0.0, [0.0] * 4, 0.0)
    empty, _ = decompose(lambda: iter(()), (0, 4), device=CPU)
    assert empty.singular_values.numel() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_non_finite_values_are_refused(bad, exact):
    matrix = torch.ones(6, 4, dtype=torch.float64)
    matrix[3, 2] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        decompose(in_blocks(matrix), (6, 4), device=CPU, exact=exact)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (700, 640), (640, 700)])
@pytest.mark.parametrize("openblas", [True, False])
def test_gram_and_its_energy(shape, openblas, monkeypatch):
    if not openblas:
        monkeypatch.setattr(gram_room, "find_openblas", lambda: None)
    matrix = torch.from_numpy(np.random.default_rng(3).standard_normal(shape))
    gram, energy = accumulate_gram(in_blocks(matrix, 400)(), shape, device=CPU)
    exact = matrix.mT @ matrix if shape[0] > shape[1] else matrix @ matrix.mT
    assert torch.allclose(gram, exact.triu(), rtol=1e-12, atol=1e-10)
    assert energy == pytest.approx(float((matrix**2).sum()), rel=1e-14)
    assert gram_energy(gram) == pytest.approx(float((exact**2).sum()), rel=1e-12)


def test_every_device_and_need_has_a_route_with_evidence():
    for device, need, side in itertools.product(("cpu", "cuda"), ("values", "vectors", "exact"), (1, 1792, 10**6)):
        assert choose_route(torch.device(device), need, side)
    assert all(route.evidence for route in ROUTES)
    assert choose_route(CPU, "values", 1792) != choose_route(CPU, "values", 1793)


def test_without_openblas_large_matrices_go_to_torch(monkeypatch):
    monkeypatch.setattr(routes, "find_openblas", lambda: None)
    assert choose_route(CPU, "values", 4096) == "gram64+torch"


@pytest.mark.parametrize("side", [1, 2, 3, 63, 64, 65, 130])
def test_two_stage_eigenvalues_at_every_relation_of_side_and_band(side):
    matrix = np.random.default_rng(side).standard_normal((side, side + 1))
    gram = matrix @ matrix.T
    exact = np.linalg.eigvalsh(gram)
    assert np.allclose(find_openblas().eigenvalues_in_place(np.triu(gram)), exact, rtol=0, atol=1e-13 * exact[-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
def test_factors_decompose_as_their_product(d_out, d_in, r, seed):
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((d_out, r)), rng.standard_normal((r, d_in))
    left, values, right = svd_of_product(torch.from_numpy(b), torch.from_numpy(a))
    assert np.allclose((left * values @ right.mT).numpy(), b @ a, atol=1e-11)
    exact = np.linalg.svd(b @ a, compute_uv=False)
    assert np.allclose(values.numpy(), exact[: len(values)], atol=1e-11)
    assert np.allclose(exact[len(values) :], 0, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("need", NEEDS)
def test_the_gpu_gives_the_same_values(need):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((600, 400)))
    device = torch.device("cuda")
    found, _ = decompose(in_blocks(matrix.to(device)), (600, 400), device=device, **NEEDS[need])
    assert np.allclose(found.singular_values.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(700, 500), (1024, 1024)])
@pytest.mark.parametrize("decades", [0, 2, 12])
@pytest.mark.parametrize("need", NEEDS)
def test_the_gpu_keeps_its_error_bounds(need, decades, shape):
    """The default SVD of CUDA, gesvdj, missed the bound of the exact route."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    matrix, device = with_spectrum(shape, np.logspace(0, -decades, min(shape))), torch.device("cuda")
    found, note = decompose(in_blocks(matrix.to(device), 300), shape, device=device, **NEEDS[need])
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert note == ""
    assert abs(found.singular_values.numpy() - exact).max() <= found.error_bound
