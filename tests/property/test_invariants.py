"""Invariants of spectra and metrics, and planted ranks that rounding must not hide."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import deltaspec
from deltaspec.linalg.svd import decompose
from deltaspec.spectra.evidence import Evidence
from deltaspec.spectra.metrics import measure
from deltaspec.types import Spectrum

CPU = torch.device("cpu")
SIDES = st.integers(1, 24)
SEEDS = st.integers(0, 10**6)
SCALE_FREE = (
    "stable_rank", "effective_rank", "energy_effective_rank", "participation_ratio", "rank_90", "rank_95", "rank_99",
    "rank_90_ratio", "effective_rank_ratio", "rank_above_noise",
)  # fmt: skip


def random_matrix(d_out, d_in, seed):
    """Values over a few decades, so that ranks are neither 1 nor full."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((d_out, d_in)) * 10 ** rng.uniform(-2, 2, (d_out, 1)))


def spectrum(matrix):
    return decompose(lambda: iter([matrix]), tuple(matrix.shape), device=CPU)[0]


def scores(matrix):
    return measure(Evidence(spectrum(matrix), base_norm=1.0))


def close(one, other, names=SCALE_FREE):
    return all(one[name] == pytest.approx(other[name], rel=1e-6) for name in names)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_transposing_changes_nothing(d_out, d_in, seed):
    matrix = random_matrix(d_out, d_in, seed)
    one, other = scores(matrix), scores(matrix.mT.contiguous())
    assert close(one, other, [*SCALE_FREE, "frobenius_norm", "spectral_norm", "nuclear_norm", "noise_sigma"])


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_rotating_either_side_changes_nothing(d_out, d_in, seed):
    matrix = random_matrix(d_out, d_in, seed)
    rng = np.random.default_rng(seed + 1)
    left, right = (torch.from_numpy(np.linalg.qr(rng.standard_normal((n, n)))[0]) for n in (d_out, d_in))
    turned = spectrum(left @ matrix @ right)
    original = spectrum(matrix)
    bound = turned.error_bound + original.error_bound + 1e-12 * float(original.singular_values[0])
    assert (turned.singular_values - original.singular_values).abs().max() <= bound


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SEEDS, st.integers(-40, 40))
def test_scaling_scales_norms_and_no_rank(d_out, d_in, seed, power):
    """By a power of two, so that not even rounding differs."""
    matrix, factor = random_matrix(d_out, d_in, seed), 2.0**power
    one, other = scores(matrix), scores(matrix * factor)
    assert close(one, other)
    for name in ("frobenius_norm", "spectral_norm", "nuclear_norm", "noise_sigma"):
        assert other[name] == pytest.approx(one[name] * factor, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SEEDS)
def test_ranks_keep_their_order(d_out, d_in, seed):
    """More energy needs more directions, and no rank exceeds the side."""
    found = scores(random_matrix(d_out, d_in, seed))
    side = min(d_out, d_in) * (1 + 1e-12)
    assert 1 <= found["rank_90"] <= found["rank_95"] <= found["rank_99"] <= side
    assert 1 - 1e-12 <= found["stable_rank"] <= found["energy_effective_rank"] * (1 + 1e-9)
    assert found["participation_ratio"] <= found["energy_effective_rank"] * (1 + 1e-9)
    assert found["energy_effective_rank"] <= found["effective_rank"] * (1 + 1e-9) <= side * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_energy_rank_is_the_least_that_suffices(values):
    values = sorted(values, reverse=True)
    tensor = torch.tensor(values, dtype=torch.float64)
    found = measure(Evidence(Spectrum(tensor, (len(values), 50), float(tensor.square().sum()), "test", 0.0)))
    squares = np.square(values)
    for name, share in (("rank_90", 0.9), ("rank_99", 0.99)):
        k, goal = found[name], share * math.fsum(squares)
        assert math.fsum(squares[:k]) >= goal * (1 - 1e-9)
        assert k == 0 or math.fsum(squares[: k - 1]) <= goal * (1 + 1e-9)


SHAPES = [(512, 512), (768, 384), (384, 768)]


def planted(folder, rank, share, seed, shape):
    """Metrics of an exactly rank-r update at ``share`` of ‖W‖, stored in bf16."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in shape)
    update = left @ right.mT * share * weight.double().norm() / math.sqrt(rank)
    save_file({"l.0.q_proj.weight": weight}, folder / "base.safetensors")
    save_file({"l.0.q_proj.weight": (weight.double() + update).bfloat16()}, folder / "tuned.safetensors")
    options = deltaspec.AnalyzeOptions(device="cpu")
    run = deltaspec.analyze(folder / "base.safetensors", folder / "tuned.safetensors", folder / "run", options=options)
    return run.records[0].metrics


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 16), st.sampled_from([0.04, 0.02, 0.01, 0.005, 0.002]), SEEDS, st.sampled_from(SHAPES))
def test_a_planted_rank_is_found_under_bf16_rounding(tmp_path_factory, rank, share, seed, shape):
    """From 4 % down to 0.2 % of ‖W‖ the count above rounding is r; energy ranks are not, and are marked."""
    found = planted(tmp_path_factory.mktemp("planted"), rank, share, seed, shape)
    assert found["rank_above_rounding"] == rank
    if share == 0.002:
        assert found["resolved"] is False
        assert found["rank_90"] > rank
    if share >= 0.02:
        assert found["resolved"] is True
        assert found["rank_90"] <= rank


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.sampled_from([0.04, 0.01, 0.002]), SEEDS, st.sampled_from(SHAPES))
def test_one_or_two_directions_are_never_missed(tmp_path_factory, rank, share, seed, shape):
    """So few directions make rounding errors a function of two numbers, structured and above the edge of noise.

    The count is then an upper bound: by at most 5 in 720 trials at these sizes (9 at 1024²).
    """
    found = planted(tmp_path_factory.mktemp("planted"), rank, share, seed, shape)
    assert rank <= found["rank_above_rounding"] <= rank + 6
