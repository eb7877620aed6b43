"""The global budget against brute force over every allocation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import OptionError
from deltaspec.extraction.budget import Unit, allocate_ranks, uniform_rank

WHOLE = st.integers(0, 40)


def units_of(spectra, costs, weights=None):
    weights = weights or [1.0] * len(costs)
    found = [np.sort(np.array(s, dtype=float))[::-1] for s in spectra]
    return [Unit(s, cost, weight) for s, cost, weight in zip(found, costs, weights, strict=True)]


def gain(units, ranks):
    return sum(u.weight * u.energies[:r].sum() for u, r in zip(units, ranks, strict=True))


def cost(units, ranks):
    return sum(u.cost * r for u, r in zip(units, ranks, strict=True))


def best(units, budget, *, min_rank=0, max_rank=99):
    """The most energy that any allocation of this budget keeps."""
    spans = []
    for unit in units:
        top = min(int((unit.energies > 0).sum()), max_rank)
        spans.append(range(min(min_rank, top), top + 1))
    return max(gain(units, ranks) for ranks in itertools.product(*spans) if cost(units, ranks) <= budget)


def allocations(equal):
    one = st.integers(1, 9)
    costs = one.flatmap(lambda c: st.tuples(*[st.just(c)] * 3)) if equal else st.tuples(one, one, one)
    spectra = st.lists(st.lists(WHOLE, min_size=1, max_size=4), min_size=3, max_size=3)
    return st.builds(lambda s, c: units_of(s, c), spectra, costs)


def affordable(units):
    return min((u.cost for u in units if u.energies[0] > 0), default=0)


@settings(max_examples=300, deadline=None)
@given(allocations(equal=False), st.integers(0, 60))
def test_the_bound_always_holds(units, more):
    budget = affordable(units) + more
    found = allocate_ranks(units, budget)
    assert found.spent == cost(units, found.ranks) == budget - found.leftover <= budget
    assert found.captured == pytest.approx(gain(units, found.ranks))
    optimum = best(units, budget)
    assert optimum - found.captured <= found.loss_bound + 1e-9
    if found.exact:
        assert found.loss_bound == 0.0
        assert found.captured == pytest.approx(optimum)


@settings(max_examples=300, deadline=None)
@given(allocations(equal=True), st.integers(0, 60))
def test_equal_costs_are_always_exact(units, more):
    budget = affordable(units) + more
    found = allocate_ranks(units, budget)
    assert found.exact
    assert found.captured == pytest.approx(best(units, budget))


@settings(max_examples=300, deadline=None)
@given(allocations(equal=False), st.data())
def test_a_budget_that_a_prefix_exhausts_is_exact(units, data):
    """Breakpoints: the sum of the first k costs in order of density."""
    items = sorted(
        ((-e / u.cost, i, j, u.cost) for i, u in enumerate(units) for j, e in enumerate(u.energies) if e > 0),
    )
    if not items:
        return
    k = data.draw(st.integers(1, len(items)))
    budget = sum(item[3] for item in items[:k])
    if budget < affordable(units):
        return
    found = allocate_ranks(units, budget)
    assert found.exact
    assert found.leftover == 0
    assert found.captured == pytest.approx(best(units, budget))


@settings(max_examples=200, deadline=None)
@given(allocations(equal=False), st.integers(0, 2), st.integers(2, 3), st.integers(0, 30))
def test_bounds_of_ranks_are_kept_and_the_bound_holds_within_them(units, low, high, more):
    tops = [min(low, int((u.energies > 0).sum())) for u in units]
    budget = max(cost(units, tops), affordable(units)) + more
    found = allocate_ranks(units, budget, min_rank=low, max_rank=high)
    assert all(top <= rank <= high for top, rank in zip(tops, found.ranks, strict=True))
    assert best(units, budget, min_rank=low, max_rank=high) - found.captured <= found.loss_bound + 1e-9


def test_the_prefix_alone_is_not_always_the_best():
    """METHODS: at arbitrary budgets the unqualified claim is false; here the bound says so, and covers the loss."""
    units = units_of([[10.0], [18.0]], [5, 10])
    found = allocate_ranks(units, 10)
    assert (found.ranks, found.exact) == ((1, 0), False)
    assert best(units, 10) - found.captured == 8.0 <= found.loss_bound == 5 * 1.8


def test_what_is_left_buys_later_directions_and_lowers_the_bound():
    units = units_of([[10.0, 1.0], [9.9]], [5, 9])
    found = allocate_ranks(units, 12)
    assert found.ranks == (2, 0)
    assert (found.spent, found.leftover, found.next_density) == (10, 2, 1.1)
    assert found.loss_bound == pytest.approx(7 * 1.1 - 1.0)
    assert best(units, 12) - found.captured <= found.loss_bound


def test_weights_turn_energies_into_relative_changes():
    plain, weighted = ([Unit(np.array([e, e / 2]), 4, w) for e, w in ((100.0, wa), (1.0, 1.0))] for wa in (1.0, 1e-4))
    assert allocate_ranks(plain, 8).ranks == (2, 0)
    assert allocate_ranks(weighted, 8).ranks == (0, 2)


def test_equal_densities_go_in_the_order_given():
    units = units_of([[1.0, 1.0]] * 3, [2, 2, 2])
    assert allocate_ranks(units, 6).ranks == (2, 1, 0)


def test_a_stack_pays_for_all_its_experts():
    """Sixteen experts of one rank cost sixteen times as much, and keep the sum of their energies."""
    single, stack = Unit(np.array([5.0, 5.0]), 10), Unit(16 * np.array([6.0, 1.0]), 160)
    assert allocate_ranks([single, stack], 170).ranks == (1, 1)


def test_nothing_is_bought_for_unchanged_matrices_and_rounding():
    noise = np.array([1.0, 0.5, 1e-17, 1e-18])
    units = [Unit(np.zeros(4), 1), Unit(noise, 10), Unit(np.zeros(0), 1)]
    found = allocate_ranks(units, 1000, min_rank=3)
    assert found.ranks == (0, 2, 0)
    assert (found.exact, found.next_density, found.leftover) == (True, 0.0, 980)
    empty = allocate_ranks([Unit(np.zeros(4), 5)], 0)
    assert (empty.ranks, empty.exact, empty.captured) == ((0,), True, 0.0)
    assert allocate_ranks([], 10).ranks == ()


def test_a_budget_too_small_says_what_it_needs():
    units = units_of([[3.0, 2.0], [1.0, 1.0]], [100, 1000])
    with pytest.raises(OptionError, match=r"budget of 99 parameters buys nothing.* needs 100 for rank 1"):
        allocate_ranks(units, 99)
    with pytest.raises(OptionError, match=r"--min-rank 2 needs 2,200 parameters over 2 matrices.*budget is 2,000"):
        allocate_ranks(units, 2000, min_rank=2)
    with pytest.raises(OptionError, match="1 for all 2 matrices needs 1,100"):
        uniform_rank(units, 1000)
    with pytest.raises(OptionError, match="2 for all 2 matrices needs 2,200"):
        uniform_rank(units, 2000, min_rank=2)


def test_one_rank_for_all_is_the_largest_that_fits():
    units = [*units_of([[3.0, 2.0, 1.0], [1.0, 1.0]], [4, 6]), Unit(np.zeros(2), 1000)]
    assert [uniform_rank(units, budget) for budget in (10, 19, 20, 29, 30, 10**6)] == [1, 1, 2, 2, 3, 3]
    assert uniform_rank(units, 10**6, max_rank=2) == 2
    assert uniform_rank([Unit(np.zeros(2), 10)], 5) == 0


def test_many_matrices_keep_their_order():
    """Against a plain loop over sorted pairs, at a size where vectorised arithmetic matters."""
    rng = np.random.default_rng(0)
    units = [Unit(np.sort(rng.exponential(size=200))[::-1] * 10 ** rng.uniform(-3, 3), int(c)) for c in
             rng.choice([128, 256, 704], size=120)]  # fmt: skip
    budget, spent, ranks = 1_000_000, 0, [0] * len(units)
    for _, i, c in sorted((-e / u.cost, i, u.cost) for i, u in enumerate(units) for e in u.energies):
        if spent + c > budget:
            break
        spent, ranks[i] = spent + c, ranks[i] + 1
    found = allocate_ranks(units, budget)
    assert all(f >= r for f, r in zip(found.ranks, ranks, strict=True))
    assert sum(f - r for f, r in zip(found.ranks, ranks, strict=True)) * 128 <= budget - spent
    assert found.captured >= gain(units, ranks)
    assert found.leftover < 128
