"""Closed forms and edge cases of METRICS; the whole table against NumPy is in tests/oracle."""

from __future__ import annotations

import math

import pytest
import torch

from deltaspec.spectra.evidence import Evidence
from deltaspec.spectra.metrics import METRICS, measure
from deltaspec.spectra.resolution import counts_rounding
from deltaspec.types import Rounding, Spectrum


def evidence(values, shape, **given):
    tensor = torch.tensor(values, dtype=torch.float64)
    return Evidence(Spectrum(tensor, shape, float(tensor.square().sum()), "test", 0.0), **given)


def rounding(ulp_energy, row_max=0.0, column_max=0.0, eps=2.0**-23):
    return Rounding(0.0, ulp_energy, row_max, column_max, eps, "BF16")


def test_equal_values_use_every_direction():
    found = measure(evidence([2.0] * 10, (10, 20), base_norm=1.0))
    ranks = ("stable_rank", "effective_rank", "energy_effective_rank", "participation_ratio")
    assert [found[name] for name in ranks] == [pytest.approx(10)] * 4
    assert [found["rank_90"], found["rank_95"], found["rank_99"]] == [9, 10, 10]
    assert found["nuclear_norm"] == pytest.approx(20)
    assert found["frobenius_norm"] == pytest.approx(math.sqrt(40))


def test_one_direction_is_rank_one():
    found = measure(evidence([3.0, 0, 0], (3, 5), base_norm=6.0))
    names = ("effective_rank", "stable_rank", "rank_90", "rank_99", "numerical_rank")
    assert [found[name] for name in names] == [1] * 5
    assert found["relative_norm"] == 0.5


def test_a_zero_delta_is_zero_everywhere_and_neither_resolved_nor_not():
    found = measure(evidence([0.0] * 4, (4, 6), base_norm=1.0, rounding=rounding(1.0, 0.5, 0.5)))
    ranks = [name for name in METRICS if "rank" in name and "null" not in name]
    assert {found[name] for name in ranks} == {0}
    assert found["resolved"] is None
    assert found["energy_above_rounding"] is None


def test_a_zero_base_has_no_relative_norm():
    assert measure(evidence([1.0], (1, 1), base_norm=0.0))["relative_norm"] is None


@pytest.mark.parametrize(("ulp_energy", "resolved"), [(1.19, True), (1.21, False)])
def test_resolved_turns_where_rounding_fills_what_rank_90_leaves_out(ulp_energy, resolved):
    """Σ ulp²/12 against 10 % of ‖ΔW‖² = 1."""
    found = measure(evidence([1.0, 0.0], (2, 2), rounding=rounding(ulp_energy, 0.1, 0.1)))
    assert found["resolved"] is resolved


def test_nothing_above_the_edge_is_never_resolved():
    found = measure(evidence([1.0, 0.5], (2, 2), rounding=rounding(1e-3, 12.0, 12.0)))
    assert (found["rank_above_rounding"], found["resolved"], found["rounding_edge"]) == (0, False, pytest.approx(2.0))


def test_stored_factors_have_no_rounding():
    found = measure(evidence([2.0, 1.0], (9, 9), base_norm=1.0, unrounded=True))
    assert (found["rounding_edge"], found["rank_above_rounding"], found["energy_above_rounding"]) == (0.0, 2, 1.0)
    assert found["resolved"] is True
    assert found["unchanged_fraction"] is None


def test_a_weight_itself_has_no_delta_metrics():
    found = measure(evidence([2.0, 1.0], (2, 2)))
    for name in ("base_norm", "relative_norm", "rounding_edge", "rank_above_rounding", "resolved", "update_to_ulp"):
        assert found[name] is None


def test_numerical_rank_follows_the_stored_precision():
    values = [1.0, 1e-6, 1e-12]
    assert measure(evidence(values, (3, 3), rounding=rounding(0.0)))["numerical_rank"] == 2
    assert measure(evidence(values, (3, 3), rounding=rounding(0.0, eps=2.0**-52)))["numerical_rank"] == 3


def test_every_metric_says_its_unit_formula_and_reference():
    assert all(metric.unit and metric.formula and metric.reference for metric in METRICS.values())
    assert list(measure(evidence([1.0], (1, 1)))) == list(METRICS)


@pytest.mark.parametrize(
    ("rank", "above", "resolved", "expected"),
    [(9.5, 9, True, True), (9, 9, True, False), (1, 9, False, True), (40, None, None, False), (None, 3, True, False)],
)
def test_a_rank_counts_rounding_where_it_exceeds_what_stands_above_it(rank, above, resolved, expected):
    metrics = {"effective_rank": rank, "rank_above_rounding": above, "resolved": resolved}
    assert counts_rounding(metrics, "effective_rank") is expected
