"""Truncation for given inputs: the closed form, perturbations, and inputs that leave directions unseen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import NumericalError
from deltaspec.extraction import whiten
from deltaspec.extraction.factor_errors import optimum
from deltaspec.extraction.factors import cast_factors
from deltaspec.extraction.whiten import balance_weighted, factor_moments, truncate_weighted, weigh, weighted_errors
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.truncated import truncate
from tests.extraction.test_factors import CPU, matrix_of, pieces

SHAPES = [(24, 16), (16, 24), (20, 20)]


def inputs_of(d_in, tokens, seed=1):
    """Correlated inputs (d_in, tokens) with outlier channels, and their second moments."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((d_in, d_in)) * np.logspace(0.5, -1.5, d_in)[:, None]
    x = mixed @ rng.standard_normal((d_in, tokens))
    return x, torch.from_numpy(x @ x.T)


def solve(matrix, moments, rank):
    return truncate_weighted(pieces(matrix), matrix.shape, moments, device=CPU, rank=rank)


def product(found, rank):
    factors = balance_weighted(found, rank)
    return (factors.lora_B @ factors.lora_A).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_it_is_the_closed_form_where_that_exists(shape, rank):
    """M* = [ΔW·T]_r·T⁻¹ with T the symmetric square root, by NumPy; and its errors."""
    matrix, (x, moments) = matrix_of(shape), inputs_of(shape[1], 200)
    w, q = np.linalg.eigh(moments.numpy())
    root = (q * np.sqrt(w)) @ q.T
    u, s, vt = np.linalg.svd(matrix @ root, full_matrices=False)
    exact = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    found = solve(matrix, moments, rank)
    assert np.linalg.norm(product(found, rank) - exact) <= 1e-6 * np.linalg.norm(exact)
    seen = np.linalg.norm((matrix - product(found, rank)) @ x) / np.linalg.norm(matrix @ x)
    best = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
    assert seen == pytest.approx(best, rel=1e-6)
    assert optimum(found.truncation, rank) == pytest.approx(best, rel=1e-6)
    assert found.truncation.energy == pytest.approx(np.linalg.norm(matrix @ x) ** 2)
    assert found.energy == pytest.approx((matrix**2).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 9])
def test_smaller_ranks_come_from_the_same_factorization(shape, tokens):
    matrix, (_, moments) = matrix_of(shape), inputs_of(shape[1], tokens)
    found = solve(matrix, moments, 8)
    for rank in (0, 2, 5):
        assert np.allclose(product(found, rank), product(solve(matrix, moments, rank), rank), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 9])
def test_no_perturbation_does_better(shape, tokens):
    """Also with fewer inputs than d_in, where S is singular and the closed form does not exist."""
    matrix, (x, moments) = matrix_of(shape), inputs_of(shape[1], tokens)
    rng, factors = np.random.default_rng(0), balance_weighted(solve(matrix, moments, 3), 3)
    a, b = factors.lora_A.numpy(), factors.lora_B.numpy()
    least = np.linalg.norm((matrix - b @ a) @ x)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(50):
            move_a, move_b = (size * np.abs(f).mean() * rng.standard_normal(f.shape) for f in (a, b))
            assert np.linalg.norm((matrix - (b + move_b) @ (a + move_a)) @ x) >= least * (1 - 1e-9)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    assert np.linalg.norm((matrix - (u[:, :3] * s[:3]) @ vt[:3]) @ x) > 1.01 * least


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_inputs_than_the_rank_are_served_exactly(shape):
    """Nine inputs span nine directions: rank 9 leaves no error that they see."""
    matrix, (x, moments) = matrix_of(shape), inputs_of(shape[1], 9)
    found = solve(matrix, moments, 9)
    assert np.linalg.norm((matrix - product(found, 9)) @ x) <= 1e-6 * np.linalg.norm(matrix @ x)
    s = np.linalg.svd(matrix @ x, compute_uv=False)
    assert optimum(found.truncation, 4) == pytest.approx(np.sqrt((s[4:] ** 2).sum() / (s**2).sum()), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 3e9, 0.0])
def test_alike_inputs_or_none_at_all_give_the_plain_truncation(shape, scale):
    matrix = matrix_of(shape)
    moments = scale * torch.eye(shape[1], dtype=torch.float64)
    plain = truncate(Streamed(pieces(matrix), shape, CPU), rank=4)
    best = (plain.left * plain.singular_values) @ plain.right.mT
    found = solve(matrix, moments, 4)
    assert np.allclose(product(found, 4), best.numpy(), atol=1e-6 * float(plain.singular_values[0]))
    assert optimum(found.truncation, 4) == pytest.approx(optimum(plain, 4), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 9])
def test_errors_of_stored_factors_are_those_the_inputs_see(shape, tokens):
    matrix, (x, moments) = matrix_of(shape), inputs_of(shape[1], tokens)
    found = solve(matrix, moments, 6)
    stored = [cast_factors(balance_weighted(found, rank), "bf16") for rank in (2, 6)]
    errors = weighted_errors(found.weighted, stored, device=CPU, energy=found.truncation.energy)
    assert errors == pytest.approx(weighted_errors(found.weighted, stored, device=CPU), rel=1e-9)
    seen = [matrix @ x - b.double().numpy() @ a.double().numpy() @ x for a, b in stored]
    assert errors == pytest.approx([np.linalg.norm(d) / np.linalg.norm(matrix @ x) for d in seen], rel=1e-5)


def test_factors_are_balanced():
    matrix, (_, moments) = matrix_of((24, 16)), inputs_of(16, 200)
    factors = balance_weighted(solve(matrix, moments, 5), 5)
    gram_a, gram_b = factors.lora_A @ factors.lora_A.mT, factors.lora_B.mT @ factors.lora_B
    values = np.linalg.svd((factors.lora_B @ factors.lora_A).numpy(), compute_uv=False)[:5]
    assert np.allclose(gram_a.numpy(), np.diag(values), atol=1e-10 * values[0])
    assert np.allclose(gram_b.numpy(), np.diag(values), atol=1e-10 * values[0])


def test_a_policy_chooses_from_the_weighted_values():
    matrix, (x, moments) = matrix_of((24, 16)), inputs_of(16, 200)
    given_values = []

    def choose(values):
        given_values.append(values)
        return 3

    found = solve(matrix, moments, choose)
    assert found.projected.shape == (3, 16)
    assert np.allclose(given_values[0].numpy(), np.linalg.svd(matrix @ x, compute_uv=False)[:16], rtol=1e-5)


def test_a_large_tall_matrix_is_weighed_anew_in_every_pass(monkeypatch):
    matrix, (_, moments) = matrix_of((24, 16)), inputs_of(16, 200)
    kept = solve(matrix, moments, 4)
    monkeypatch.setattr(whiten, "WHOLE", 10)
    streamed = solve(matrix, moments, 4)
    assert len(list(streamed.weighted.blocks())) > len(list(kept.weighted.blocks())) == 1
    assert np.allclose(product(streamed, 4), product(kept, 4), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_a_weighted_matrix_join_to_it(shape, monkeypatch):
    matrix, (_, moments) = matrix_of((shape[0] * 5, shape[1] * 5)), inputs_of(shape[1] * 5, 300)
    monkeypatch.setattr(whiten, "BLOCK", 64)
    weighted = weigh(pieces(matrix), matrix.shape, moments, device=CPU)
    blocks = list(weighted.blocks())
    assert len(blocks) > 1
    assert all(block.is_contiguous() for block in blocks)
    joined = torch.cat(blocks, dim=0 if shape[0] >= shape[1] else 1).numpy()
    assert np.allclose(joined @ joined.T, matrix @ moments.numpy() @ matrix.T, rtol=1e-9, atol=1e-9 * (joined**2).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.booleans(), st.integers(0, 10**6))
def test_any_semi_definite_matrix_has_a_factor(d_in, tokens, single, seed):
    """Singular, with channels that no input touches, and after storage in float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((d_in, tokens)) * 10 ** rng.uniform(-3, 3, (d_in, 1)) * (rng.random((d_in, 1)) > 0.2)
    moments = torch.from_numpy(x @ x.T)
    moments = moments.float().double() if single else moments
    root = factor_moments(moments, d_in)
    if bool(moments.any()):
        assert float((root @ root.mT - moments).norm()) <= (1e-5 if single else 1e-12) * float(moments.norm())
    assert torch.equal(root, root.tril())


def test_moments_that_make_no_sense_are_refused():
    good = torch.eye(4, dtype=torch.float64)
    negative = torch.diag(torch.tensor([1.0, 1.0, -1e-3, 1.0], dtype=torch.float64))
    with pytest.raises(NumericalError, match=r"eigenvalue of -0.001 beside a norm of 1.73"):
        factor_moments(negative, 4)
    for bad in (torch.nan, torch.inf):
        broken = good.clone()
        broken[2, 1] = broken[1, 2] = bad
        with pytest.raises(NumericalError, match="NaN or infinity"):
            factor_moments(broken, 4)
    with pytest.raises(NumericalError, match=r"shape \(4, 4\), expected \(5, 5\)"):
        factor_moments(good, 5)


@pytest.mark.parametrize("least", [0.5, 0.0, -0.5 * 2.0**-46, -0.5 * 2.0**-32, -0.9 * 2.0**-20])
def test_the_factor_is_that_of_the_moments_and_the_least_shift_that_serves(least):
    """δ = ‖S‖·d·eps·8ᵏ: with d = 32, of 2⁻⁴⁷, 2⁻⁴⁴ … 2⁻²⁰ the first above what is missing to zero."""
    values = torch.ones(32, dtype=torch.float64)
    norm = np.sqrt(31 + max(least, 0.0) ** 2)
    values[5] = least if least > 0 else least * norm
    root = factor_moments(torch.diag(values), 32)
    shift = next(2.0**power for power in range(-47, -19, 3) if 2.0**power > -least) * norm
    assert torch.equal(root, root.tril())
    found = (root @ root.mT).numpy()
    assert found[5, 5] - float(values[5]) == pytest.approx(shift, rel=1e-2, abs=2e-16)
    assert np.allclose(found, np.diag(values.numpy() + shift), rtol=0, atol=4e-16)


def test_a_shift_beyond_the_rounding_of_float32_is_refused():
    values = torch.ones(32, dtype=torch.float64)
    values[5] = -1.1 * 2.0**-20 * np.sqrt(31)
    with pytest.raises(NumericalError, match="expected none below 0"):
        factor_moments(torch.diag(values), 32)


def test_moments_are_read_and_not_written():
    _, moments = inputs_of(16, 9)
    before = moments.clone()
    factor_moments(moments, 16)
    assert torch.equal(moments, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_and_broken_deltas(shape):
    _, moments = inputs_of(shape[1], 200)
    found = solve(np.zeros(shape), moments, 4)
    assert found.truncation.energy == found.energy == 0.0
    assert not product(found, 4).any()
    broken = matrix_of(shape)
    broken[3, 5] = np.nan
    with pytest.raises(NumericalError, match="NaN"):
        solve(broken, moments, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_agrees_with_the_cpu(shape):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrix, (_, moments), device = matrix_of(shape), inputs_of(shape[1], 200), torch.device("cuda")
    found = truncate_weighted(
        lambda: (block.to(device) for block in pieces(matrix)()), shape, moments, device=device, rank=4
    )
    assert np.allclose(product(found, 4), product(solve(matrix, moments, 4), 4), atol=1e-9)
    stored = [cast_factors(balance_weighted(found, 4), "fp32")]
    (error,) = weighted_errors(found.weighted, stored, device=device)
    assert error == pytest.approx(optimum(found.truncation, 4), rel=1e-5)
