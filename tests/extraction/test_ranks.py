"""Ranks of one matrix, against exact rational arithmetic and the singular values of real updates."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.extraction.ranks import POLICIES, RankChoice, clamp, rank_above, rank_for_energy, rank_for_error
from deltaspec.linalg.svd import decompose
from deltaspec.options import BUDGETS, RankOptions
from deltaspec.options import POLICIES as NAMES
from deltaspec.types import Truncation

VALUES = st.lists(st.integers(0, 2**20), min_size=1, max_size=30).map(lambda v: sorted(v, reverse=True))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def least(values, allowed):
    """Least r whose exact residual is at most ``allowed``."""
    tails = [sum(Fraction(v) ** 2 for v in values[r:]) for r in range(len(values) + 1)]
    return next(r for r, tail in enumerate(tails) if tail <= allowed)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(1, 99))
def test_energy_rank_is_the_least_that_suffices(values, percent):
    """Whole numbers, so that the oracle is exact; ties at the limit included."""
    energy = sum(v**2 for v in values)
    share = percent / 100
    exact = least(values, (1 - Fraction(percent, 100)) * energy)
    assert rank_for_energy(tensor(values), energy=float(energy), share=share) == exact


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(1, 100))
def test_error_rank_is_the_least_that_suffices(values, percent):
    energy = sum(v**2 for v in values)
    exact = least(values, Fraction(percent, 100) ** 2 * energy)
    assert rank_for_error(tensor(values), energy=float(energy), error=percent / 100) == exact


def test_equal_values_on_the_very_limit_take_no_extra_rank():
    """(1 - .9)·10 is .9999999999999998 in floating point."""
    assert rank_for_energy(torch.ones(10, dtype=torch.float64), energy=10.0, share=0.9) == 9
    assert rank_for_error(torch.ones(100, dtype=torch.float64), energy=100.0, error=0.1) == 99


@pytest.mark.parametrize("more", [0.0, 1e-15, -1e-15])
def test_all_of_the_energy_takes_all_nonzero_values(more):
    """Also where the energy, summed from elements, is a rounding above or below Σσ²."""
    values = tensor([3.0, 2.0, 1.0, 1e-3, 0.0, 0.0])
    energy = float(values.square().sum()) * (1 + more)
    assert rank_for_energy(values, energy=energy, share=1.0) == 4


def test_small_errors_do_not_cancel():
    """1 - Σσ²/‖ΔW‖² has no digit left of the residual here; the tail has all."""
    values = tensor([1.0, 3e-7, 1e-7, 1e-7])
    energy = float(values.square().sum())
    assert rank_for_error(values, energy=energy, error=1.5e-7) == 2
    assert rank_for_error(values, energy=energy, error=1.2e-7) == 3
    assert rank_for_error(values, energy=energy, error=4e-7) == 1


def test_a_zero_matrix_has_rank_zero():
    zero = torch.zeros(5, dtype=torch.float64)
    assert rank_for_energy(zero, energy=0.0, share=1.0) == 0
    assert rank_for_error(zero, energy=0.0, error=0.1) == 0
    assert rank_above(zero, edge=0.0) == 0
    assert rank_for_energy(torch.zeros(0, dtype=torch.float64), energy=0.0, share=0.9) == 0


def test_energy_that_the_values_do_not_hold_is_not_reached():
    values = tensor([2.0, 1.0, 1.0])
    assert rank_for_energy(values, energy=8.0, share=0.5) == 1
    assert rank_for_energy(values, energy=8.0, share=0.6) == 2
    assert rank_for_energy(values, energy=8.0, share=0.9) == 3


@pytest.mark.parametrize("shape", [(300, 200), (96, 96), (64, 500)])
@pytest.mark.parametrize("decay", [0.0, 4.0])
def test_an_update_of_exact_rank_8_needs_8_for_all_of_it(shape, decay):
    """What rounding leaves in a Gram matrix's eigenvalues is no energy to be kept."""
    rng = np.random.default_rng(1)
    update = rng.standard_normal((shape[0], 8)) * np.logspace(0, -decay, 8) @ rng.standard_normal((8, shape[1]))
    matrix = torch.from_numpy(update)
    spectrum, _ = decompose(lambda: iter([matrix]), shape, device=torch.device("cpu"))
    assert rank_for_energy(spectrum.singular_values, energy=spectrum.energy, share=1.0) == 8


def test_above_an_edge_and_within_bounds():
    assert rank_above(tensor([3.0, 2.0, 1.0]), edge=2.0) == 1
    assert [clamp(r, minimum=2, maximum=8, side=100) for r in (0, 5, 50)] == [2, 5, 8]
    assert clamp(50, minimum=0, maximum=0, side=12) == 12
    assert clamp(1, minimum=16, maximum=0, side=12) == 12


def test_policies_are_those_of_the_options_and_say_what_they_do():
    assert tuple(POLICIES) == NAMES
    values = tensor([4.0, 2.0, 1.0])
    for name, policy in POLICIES.items():
        assert policy.description
        assert policy.unit
        assert (policy.function is None) == (policy.needs == "all") == (name in BUDGETS)
        assert policy.needs in ("top", "values", "all")
    amounts = {"rank": 2, "energy": 0.9, "error": math.sqrt(1 / 21), "above_rounding": 1.5}
    assert {name: POLICIES[name].function(values, 21.0, amount) for name, amount in amounts.items()} == {
        "rank": 2, "energy": 2, "error": 2, "above_rounding": 2,
    }  # fmt: skip


SIGMAS = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def truncation(values, held):
    """A truncation of a matrix with these singular values that holds the first of them."""
    energy = float(values.square().sum())
    sides = torch.eye(len(values), dtype=torch.float64)[:, :held]
    residual = float(values[held:].square().sum())
    return Truncation(sides, values[:held], sides, (len(values),) * 2, energy, residual, 0.0, "test", values)


def test_ranks_that_a_budget_bought_are_held_under_the_side_alone():
    choice = RankChoice({"a": 3, "b": 9, "c": 0}, True, RankOptions("params", (1,), minimum=2, maximum=2), side=4)
    assert choice.known == {"a": 3, "b": 4, "c": 0}
    assert choice.largest == 4


def test_fixed_ranks_keep_their_bounds_and_never_exceed_what_was_found():
    choice = RankChoice({"a": 1, "b": 9}, False, RankOptions("rank", (1, 9), minimum=2, maximum=3), side=4)
    assert choice.known == {"a": 2, "b": 3}
    assert choice.largest == 3
    assert choice.settle(truncation(SIGMAS, 2)) == {"a": 2, "b": 2}


def test_a_policy_gives_the_same_ranks_before_and_after_the_truncation():
    labels = {"half": 0.7, "most": 0.99}
    choice = RankChoice(labels, False, RankOptions("energy", (0.7, 0.99), maximum=3), side=4)
    energy = float(SIGMAS.square().sum())
    wanted = {label: min(rank_for_energy(SIGMAS, energy, share), 3) for label, share in labels.items()}
    assert choice.known is None
    assert choice.largest(SIGMAS) == max(wanted.values()) == 3
    assert choice.settle(truncation(SIGMAS, 3)) == wanted == {"half": 1, "most": 3}


def test_the_edge_of_rounding_is_asked_for_by_its_policy_alone():
    asked = []

    def edge():
        asked.append(1.5)
        return 1.5

    options = RankOptions("above_rounding")
    assert RankChoice(options.labels(), False, options, 4, edge).choose(SIGMAS) == {"above-rounding": 2}
    options = RankOptions("error", (0.5,))
    assert RankChoice(options.labels(), False, options, 4, edge).choose(SIGMAS) == {"error-0.5": 1}
    assert asked == [1.5]


def test_a_zero_matrix_gets_no_direction_whatever_the_minimum():
    options, zero = RankOptions("energy", (0.9,), minimum=2), torch.zeros(4, dtype=torch.float64)
    choice = RankChoice({"a": 0.9}, False, options, side=4)
    assert choice.choose(zero) == {"a": 0}
    assert choice.settle(truncation(zero, 0)) == {"a": 0}
    assert choice.settle(replace(truncation(zero, 0), values=None)) == {"a": 0}
