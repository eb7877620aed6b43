"""W + ΔW against NumPy: one rounding, and what it lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import NumericalError
from deltaspec.merging import apply
from deltaspec.merging.apply import Loss, Summands, merge_block, merge_rows

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(values: np.ndarray, mantissa: int) -> np.ndarray:
    """Round float32 values to so many mantissa bits, half to even, in float64 arithmetic (normal numbers only)."""
    exact = values.astype(np.float64)
    _, exponent = np.frexp(exact)
    spacing = np.ldexp(1.0, exponent - 1 - mantissa)
    return np.round(exact / spacing) * spacing  # np.round is half to even


@pytest.mark.parametrize("dtype", MANTISSA)
def test_the_sum_is_formed_in_float32_and_rounded_once(dtype):
    weight = draw(60, 70)
    weight, update = (weight + weight.sign()).to(dtype), draw(60, 70, seed=1, scale=1e-2)  # none is subnormal
    merged, _ = merge_block(weight, update, dtype=dtype)
    total = weight.float().numpy() + update.numpy().astype(np.float32)
    assert np.array_equal(merged.double().numpy(), nearest(total, MANTISSA[dtype]))


def test_float64_is_summed_in_float64():
    weight, update = draw(5, 6), draw(5, 6, seed=1, scale=1e-12)
    merged, loss = merge_block(weight, update, dtype=torch.float64)
    assert np.array_equal(merged.numpy(), weight.numpy() + update.numpy())
    assert loss.relative < 1e-3


@pytest.mark.parametrize("share", [1.0, 0.25, -0.5])
def test_a_whole_tensor_replaces_by_its_share(share):
    weight, whole, update = draw(9, 4).float(), draw(9, 4, seed=1).float(), draw(9, 4, seed=2, scale=0.1)
    merged, loss = merge_block(weight, update, dtype=torch.float32, whole=whole, share=share)
    w, f, u = (t.double().numpy() for t in (weight, whole, update))
    assert np.allclose(merged.double().numpy(), w + share * (f - w) + u, rtol=0, atol=1e-6)
    assert loss.update == pytest.approx(float(((share * (f - w) + u) ** 2).sum()), rel=1e-12)


def test_a_full_share_alone_is_taken_bit_for_bit():
    weight, whole = draw(7, 7).bfloat16(), draw(7, 7, seed=1).bfloat16()
    merged, loss = merge_block(weight, torch.zeros(7, 7, dtype=torch.float64), dtype=torch.bfloat16, whole=whole)
    assert torch.equal(merged, whole)
    assert loss.relative == 0


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-6, 1e3), seed=st.integers(0, 999), rows=st.integers(1, 40), columns=st.integers(1, 30))
def test_the_loss_is_that_of_the_stored_values(scale, seed, rows, columns):
    weight, update = draw(rows, columns, seed=seed).bfloat16(), draw(rows, columns, seed=seed + 1, scale=scale)
    merged, loss = merge_block(weight, update, dtype=torch.bfloat16)
    moved = merged.double().numpy() - weight.double().numpy()
    change = update.numpy()
    assert loss.relative == pytest.approx(np.linalg.norm(moved - change) / np.linalg.norm(change), rel=1e-9)
    assert loss.unchanged == int((moved == 0).sum())
    assert loss.elements == rows * columns


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, a, b = draw(50, 30).bfloat16(), draw(3, 30, seed=1), draw(50, 3, seed=2, scale=1e-2)
    results = []
    for block in (1, 95, 10**6):
        monkeypatch.setattr(apply, "BLOCK", block)
        out = torch.empty_like(weight)
        loss = merge_rows(
            Summands(lambda i, j: weight[i:j], lambda i, j: b[i:j] @ a),
            lambda i, j, rows: out[i:j].copy_(rows),  # noqa: B023 (called before the next turn)
            shape=(50, 30),
            dtype=torch.bfloat16,
        )
        results.append((out, loss))
    for out, loss in results[1:]:
        assert torch.equal(out, results[0][0])
        assert loss.error == pytest.approx(results[0][1].error, rel=1e-9)
        assert (loss.unchanged, loss.elements) == (results[0][1].unchanged, 1500)


def test_losses_add_up():
    one, other = Loss(4.0, 1.0, 3, 10), Loss(5.0, 0.0, 7, 10)
    assert (one + other).relative == pytest.approx(1 / 3)
    assert (one + other).unchanged_share == 0.5
    assert Loss().relative is None


@pytest.mark.parametrize(("weight", "update", "dtype", "said"), [
    (math.nan, 0.0, torch.float32, "the base holds NaN"),
    (1.0, math.inf, torch.float32, "the adapter holds NaN"),
    (6e4, 6e4, torch.float16, "up to 1.2e\\+05 do not fit float16"),
])  # fmt: skip
def test_what_is_not_finite_is_refused(weight, update, dtype, said):
    with pytest.raises(NumericalError, match=said):
        merge_block(torch.full((2, 2), weight), torch.full((2, 2), update, dtype=torch.float64), dtype=dtype)
