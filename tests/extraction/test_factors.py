"""Factors as they are stored: balanced, cast, measured and joined; NumPy float64 is the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import NumericalError
from deltaspec.extraction.factor_errors import optimum, product_error, stored_errors
from deltaspec.extraction.factors import balance, block_diagonal, cast_factors, pad
from deltaspec.files.dtypes import GRIDS, OPTIONS
from deltaspec.types import LowRankDelta, Truncation

CPU = torch.device("cpu")
SHAPES = [(40, 30), (30, 40), (33, 33)]


def matrix_of(shape, seed=0):
    """Singular values over four decades."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((shape[0], 1)) * rng.standard_normal(shape) * np.logspace(0, -4, shape[1])


def truncated(matrix, rank, *, values=True, excess=0.0):
    """A truncation by NumPy."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    parts = [torch.from_numpy(np.ascontiguousarray(p)) for p in (u[:, :rank], s[:rank], vt[:rank].T)]
    energy, residual = float((matrix**2).sum()), float((s[rank:] ** 2).sum())
    return Truncation(*parts, matrix.shape, energy, residual, excess, "test", torch.from_numpy(s) if values else None)


def pieces(matrix, sizes=(7, 1, 13)):
    """Blocks along the longer axis, of uneven sizes."""
    tensor, axis = torch.from_numpy(matrix), 0 if matrix.shape[0] >= matrix.shape[1] else 1

    def blocks():
        start, i = 0, 0
        while start < tensor.shape[axis]:
            length = min(sizes[i % len(sizes)], tensor.shape[axis] - start)
            yield tensor.narrow(axis, start, length).contiguous()
            start, i = start + length, i + 1

    return blocks


def relative(matrix, lora_A, lora_B):
    difference = matrix - lora_B.double().numpy() @ lora_A.double().numpy()
    return np.linalg.norm(difference) / np.linalg.norm(matrix)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 30])
def test_balanced_factors_are_the_best_approximation_and_share_its_size(shape, rank):
    matrix = matrix_of(shape)
    factors = balance(truncated(matrix, 30), rank)
    assert factors.lora_A.shape == (rank, shape[1])
    assert factors.lora_B.shape == (shape[0], rank)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.abs((factors.lora_B @ factors.lora_A).numpy() - best).max() <= 1e-13 * s[0]
    sizes = factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0)
    assert np.allclose(sizes[0].numpy(), np.sqrt(s[:rank]))
    assert torch.allclose(*sizes)


def test_ranks_of_one_truncation_are_slices():
    found = truncated(matrix_of((40, 30)), 16)
    small, large = balance(found, 4), balance(found, 99)
    assert large.lora_A.shape[0] == 16
    assert torch.equal(small.lora_A, large.lora_A[:4])
    assert torch.equal(small.lora_B, large.lora_B[:, :4])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(OPTIONS))
def test_stored_errors_are_those_of_the_rounded_factors(shape, dtype):
    """Several ranks in one pass; a truncated fp32 error of 1e-7 keeps its digits too."""
    matrix = matrix_of(shape)
    found = truncated(matrix, 30)
    stored = [cast_factors(balance(found, rank), dtype) for rank in (0, 3, 12, 30)]
    assert all(a.dtype == b.dtype == OPTIONS[dtype].torch for a, b in stored)
    errors = stored_errors(pieces(matrix), shape, stored, device=CPU, energy=found.energy)
    assert errors == pytest.approx([relative(matrix, a, b) for a, b in stored], rel=1e-9)
    assert errors == pytest.approx(stored_errors(pieces(matrix), shape, stored, device=CPU), rel=1e-12)
    assert errors[0] == 1.0
    if dtype == "fp32":
        assert errors[:3] == pytest.approx([optimum(found, rank) for rank in (0, 3, 12)], rel=1e-5)


def test_an_error_far_below_rounding_of_the_energy_is_measured():
    """‖ΔW‖² - 2⟨ΔW, BA⟩ + ‖BA‖² would give 0 or √eps here."""
    matrix = np.outer(np.ones(40), np.ones(30))
    lora_A, lora_B = torch.ones(1, 30, dtype=torch.float64), torch.full((40, 1), 1 + 2.0**-40, dtype=torch.float64)
    (error,) = stored_errors(pieces(matrix), (40, 30), [(lora_A, lora_B)], device=CPU)
    assert error == pytest.approx(2.0**-40, rel=1e-12)
    delta = LowRankDelta(torch.ones(1, 30, dtype=torch.float64), torch.ones(40, 1, dtype=torch.float64))
    assert product_error(delta, (lora_A, lora_B), energy=1200.0) == pytest.approx(2.0**-40, rel=1e-3)


def test_errors_of_a_zero_matrix():
    matrix = np.zeros((9, 6))
    nothing, something = (torch.full((2, 6), v) for v in (0.0, 1.0))
    factors = [(nothing, torch.ones(9, 2)), (something, torch.ones(9, 2))]
    assert stored_errors(pieces(matrix), (9, 6), factors, device=CPU) == [0.0, math.inf]


def test_blocks_are_read_and_not_written():
    matrix = matrix_of((40, 30))
    tensor = torch.from_numpy(matrix.copy())
    stored_errors(
        lambda: iter([tensor]), (40, 30), [cast_factors(balance(truncated(matrix, 3), 3), "fp32")], device=CPU
    )
    assert np.array_equal(tensor.numpy(), matrix)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_the_error_of_a_product_needs_no_dense_matrix(d_out, d_in, old, new, seed):
    rng = np.random.default_rng(seed)
    a, b, lora_a, lora_b = (
        torch.from_numpy(rng.standard_normal(s)) for s in ((old, d_in), (d_out, old), (new, d_in), (d_out, new))
    )
    dense = (b @ a).numpy()
    error = product_error(LowRankDelta(a, b), (lora_a, lora_b), energy=float((dense**2).sum()))
    assert error == pytest.approx(relative(dense, lora_a, lora_b), rel=1e-9)
    assert product_error(LowRankDelta(a, b), (a, b), energy=float((dense**2).sum())) < 1e-12


@pytest.mark.parametrize("values", [True, False])
def test_the_optimum_is_eckart_youngs(values):
    matrix = matrix_of((40, 30))
    found = truncated(matrix, 12, values=values)
    s = np.linalg.svd(matrix, compute_uv=False)
    for rank in (0, 1, 7, 12):
        assert optimum(found, rank) == pytest.approx(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), rel=1e-9)


def test_an_estimated_excess_lowers_the_optimum():
    found = truncated(matrix_of((40, 30)), 12, values=False, excess=0.01)
    plain = truncated(matrix_of((40, 30)), 12, values=False)
    assert optimum(found, 12) == pytest.approx(optimum(plain, 12) / 1.01)
    assert optimum(truncated(np.zeros((4, 3)), 0), 0) == 0.0


def factors_of(scale_a, scale_b, shape=(8, 6), rank=3):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 1, (rank, shape[1])), rng.uniform(0.5, 1, (shape[0], rank))
    return LowRankDelta(torch.from_numpy(a * np.array(scale_a)[:, None]), torch.from_numpy(b * np.array(scale_b)))


def test_fp16_overflow_is_refused_and_named():
    factors = factors_of([1, 1, 1], [1, 2e5, 1])
    with pytest.raises(NumericalError, match=r"its lora_B reaches .*e\+05, above fp16's largest, 6.55e\+04.*bf16"):
        cast_factors(factors, "fp16")
    assert all(bool(torch.isfinite(f).all()) for f in cast_factors(factors, "bf16"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_refused(bad):
    with pytest.raises(NumericalError, match="its lora_A holds NaN or infinity"):
        cast_factors(factors_of([1, bad, 1], [1, 1, 1]), "fp32")


def test_a_direction_that_vanishes_is_refused_where_it_counts():
    """Either factor's underflow loses the direction; one of a millionth of √energy is lost to rounding anyway."""
    with pytest.raises(NumericalError, match=r"its direction 2 of 3 .* below fp16's smallest number 5.96e-08.*fp32"):
        cast_factors(factors_of([1, 1, 1], [1e-6, 2e-8, 1e-6]), "fp16")
    with pytest.raises(NumericalError, match="its direction 1 of 3"):
        cast_factors(factors_of([1e-9, 1e-9, 1e-9], [1e-9, 1e-9, 1e-9]), "fp16")
    lora_A, _ = cast_factors(factors_of([1, 1e-9, 1], [1, 1e-9, 1]), "fp16")
    assert not bool(lora_A[1].any())
    assert bool(lora_A[2].any())
    cast_factors(factors_of([1, 0, 1], [1, 0, 1]), "fp16")  # zero to begin with
    cast_factors(factors_of([], [], rank=0), "fp16")


def test_dtype_names_are_those_of_the_file_format():
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
        assert OPTIONS[name].torch == dtype
        assert torch.finfo(dtype).eps == 2.0 ** -GRIDS[{"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[name]].mantissa


def test_padding_changes_no_product():
    lora_A, lora_B = cast_factors(factors_of([1, 2, 3], [1, 1, 1]), "bf16")
    wide_A, wide_B = pad(lora_A, lora_B, 8)
    assert wide_A.shape == (8, 6)
    assert wide_B.shape == (8, 8)
    assert wide_A.dtype == wide_B.dtype == torch.bfloat16
    assert torch.equal(wide_B.double() @ wide_A.double(), lora_B.double() @ lora_A.double())
    assert torch.equal(pad(lora_A, lora_B, 3)[0], lora_A)


def test_parts_of_a_fused_matrix_write_their_own_rows():
    """Interleaved rows, parts of different rank, one of rank 0, and rows that no part has."""
    rng = np.random.default_rng(0)
    places = [np.array([0, 2, 4]), np.array([5, 1]), np.array([3])]
    parts, whole = [], np.zeros((8, 5))
    for rows, rank in zip(places, (2, 1, 0), strict=True):
        a, b = rng.standard_normal((rank, 5)), rng.standard_normal((len(rows), rank))
        parts.append((torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(rows)))
        whole[rows] = b @ a
    lora_A, lora_B = block_diagonal(parts, rows=8)
    assert lora_A.shape == (3, 5)
    assert np.allclose((lora_B @ lora_A).numpy(), whole, atol=1e-14)
    assert block_diagonal([(a.bfloat16(), b.bfloat16(), r) for a, b, r in parts], rows=8)[1].dtype == torch.bfloat16
