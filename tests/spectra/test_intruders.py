"""Subspaces, amplification and intruders: closed forms, NumPy, simulation, and the papers' printed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltaspec.spectra.subspaces import (
    amplify,
    compare_subspaces,
    find_intruders,
    null_cosine,
    null_projection,
    random_change,
)


def basis(d, k, seed):
    return torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_phi_is_one_inside_zero_apart_and_its_null_on_average():
    whole = basis(12, 12, 0)
    inside = compare_subspaces(whole[:, :2], whole[:, :5])
    assert inside.phi == pytest.approx(1)
    assert (inside.null, inside.excess) == (5 / 12, pytest.approx(7 / 12))
    assert compare_subspaces(whole[:, :3], whole[:, 3:7]).phi == pytest.approx(0, abs=1e-28)
    turned = compare_subspaces(whole[:, :3] @ basis(3, 3, 1), whole[:, :3])
    assert turned.phi == pytest.approx(1)  # of a subspace, not of its vectors
    drawn = [compare_subspaces(basis(12, 3, seed), basis(12, 5, 999 + seed)).excess for seed in range(400)]
    assert abs(np.mean(drawn)) < 4 * np.std(drawn) / math.sqrt(400)
    for nothing in (compare_subspaces(whole[:, :0], whole), compare_subspaces(whole, whole[:, :0])):
        assert (nothing.phi, nothing.null, nothing.excess) == (0, 0, 0)


def test_phi_is_one_minus_the_projection_metric():
    first, second = basis(9, 4, 3), basis(9, 4, 4)
    cosines = np.linalg.svd(first.numpy().T @ second.numpy(), compute_uv=False)
    distance = 4 - (cosines**2).sum()  # d² of the projection metric
    assert compare_subspaces(first.float(), second.float()).phi == pytest.approx(1 - distance / 4, rel=1e-6)


def test_amplification_against_numpy_and_the_printed_table():
    weight, change = random(20, 30), random(20, 30, seed=1)
    u, s, vt = np.linalg.svd(change.numpy())
    left, right = torch.from_numpy(u[:, :4].copy()), torch.from_numpy(vt[:4].T.copy())
    found = amplify(weight, left, right, norm=float(np.linalg.norm(s)))
    projected = np.linalg.norm(u[:, :4].T @ weight.numpy() @ vt[:4].T)
    assert found.projected == pytest.approx(projected)
    assert found.factor == pytest.approx(np.linalg.norm(change.numpy()) / projected)
    squares = [amplify(weight, basis(20, 4, s), basis(30, 4, 999 + s), norm=1.0).projected ** 2 for s in range(400)]
    assert found.null**2 == pytest.approx(np.mean(squares), rel=0.1)
    assert amplify(torch.zeros(20, 30), left, right, norm=1.0).factor == math.inf
    # GPT-3, layer 48, W_q: ‖W‖ = 61.95 at 12288²; the table prints 0.02 and 0.33.
    assert null_projection(61.95, 4, (12288, 12288)) == pytest.approx(0.0202, abs=5e-5)
    assert null_projection(61.95, 64, (12288, 12288)) == pytest.approx(0.3227, abs=5e-5)


def test_the_amplification_factors_that_the_table_gives():
    for norm, projected, printed in ((6.91, 0.32, 21.5), (3.57, 1.90, 1.9)):
        weight = torch.diag(torch.tensor([projected, 0.0]))
        unit = torch.tensor([[1.0], [0.0]])
        assert amplify(weight, unit, unit, norm=norm).factor == pytest.approx(printed, rel=0.015)


def test_intruders_against_numpy():
    weight = random(24, 16)
    tuned = weight + 6 * torch.outer(basis(24, 1, 5)[:, 0], basis(16, 1, 6)[:, 0])
    base_left = np.linalg.svd(weight.numpy(), full_matrices=False)[0]
    u, s, _ = np.linalg.svd(tuned.numpy(), full_matrices=False)
    cosines = np.abs(base_left.T @ u[:, :10]).max(0)
    own, base = torch.from_numpy(base_left[:, :10].copy()), torch.from_numpy(base_left)
    found = find_intruders(torch.from_numpy(u[:, :10].copy()), torch.from_numpy(s), base, energy=float((s**2).sum()))
    assert np.allclose(found.cosines.numpy(), cosines)
    assert found.count == (cosines < 0.5).sum() > 0
    assert found.energy_share == pytest.approx((s[:10][cosines < 0.5] ** 2).sum() / (s**2).sum())
    same = find_intruders(own, torch.from_numpy(s), base, energy=1.0)
    assert (same.count, same.energy_share) == (0, 0)


@pytest.mark.parametrize(("d", "measured"), [(768, 0.121), (1024, 0.108), (4096, 0.060)])
def test_the_null_cosine_is_what_was_measured_below_its_bound(d, measured):
    assert null_cosine(d) == pytest.approx(measured, abs=1e-3)
    assert null_cosine(d) < math.sqrt(2 * math.log(d) / d)


def test_the_null_cosine_in_closed_form_and_by_simulation():
    assert null_cosine(1) == pytest.approx(1, abs=1e-6)
    assert null_cosine(2) == pytest.approx(2 * math.sqrt(2) / math.pi, abs=1e-6)  # mean of max(|cos θ|, |sin θ|)
    assert null_cosine(3, 1) == pytest.approx(0.5, abs=1e-6)  # a coordinate of the sphere is uniform
    vectors = np.random.default_rng(0).standard_normal((20000, 40))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    largest = np.abs(vectors[:, :25]).max(1)
    assert null_cosine(40, 25) == pytest.approx(largest.mean(), abs=4 * largest.std() / math.sqrt(20000))


def test_a_random_change_has_its_spectrum_its_seed_and_directions_of_no_one():
    values = torch.tensor([5.0, 2.0, 0.5])
    lora_B, lora_A = random_change(values, (12, 9), seed=3)
    assert (lora_B.shape, lora_A.shape, lora_B.dtype) == ((12, 3), (3, 9), torch.float64)
    found = np.linalg.svd((lora_B @ lora_A).numpy(), compute_uv=False)
    assert np.allclose(found, [5, 2, 0.5] + 6 * [0], atol=1e-12)
    left = (lora_B / values.double()).numpy()
    assert np.allclose(left.T @ left, np.eye(3), atol=1e-12)
    assert np.allclose(lora_A.numpy() @ lora_A.numpy().T, np.eye(3), atol=1e-12)
    again, other = (random_change(values, (12, 9), seed=seed)[0] for seed in (3, 4))
    assert torch.equal(again, lora_B)
    assert not torch.allclose(other, lora_B)


def test_random_changes_lean_no_way():
    """Each entry's mean over draws is 0, its mean square ‖ΔW‖²/(d_out·d_in), and so is its square along any base's."""
    values, fixed = torch.tensor([3.0, 1.0]), random(6, 5, seed=8).numpy()
    draws = np.stack([(b @ a).numpy() for b, a in (random_change(values, (6, 5), seed=s) for s in range(2000))])
    error = math.sqrt(10 / 30 / 2000)
    assert np.abs(draws.mean(0)).max() < 5 * error
    assert np.allclose((draws**2).mean(0), 10 / 30, rtol=0.2)
    along = (draws * fixed).sum((1, 2)) / np.linalg.norm(fixed)
    assert (along**2).mean() == pytest.approx(10 / 30, rel=0.15)
