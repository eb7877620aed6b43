"""Sums of x·xᵀ against one dense product in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaspec.errors import NumericalError
from deltaspec.linalg import gram_sum
from deltaspec.linalg.gram_sum import GramSum

CPU = torch.device("cpu")


@pytest.mark.parametrize("library", [True, False], ids=["openblas", "torch"])
@pytest.mark.parametrize("sizes", [(1,), (255, 1, 3), (256,), (300, 7), (4097,)])
def test_the_sum_is_that_of_one_product(sizes, library, monkeypatch):
    if not library:
        monkeypatch.setattr(gram_sum, "find_openblas", lambda: None)
    rows = np.random.default_rng(0).standard_normal((sum(sizes), 6)).astype(np.float32)
    sums = GramSum(6, device=CPU)
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        sums.add(torch.from_numpy(part))
    exact = rows.astype(np.float64).T @ rows.astype(np.float64)
    assert np.allclose(np.triu(sums.result().numpy()), np.triu(exact), rtol=1e-13, atol=1e-12)


def test_rows_may_be_overwritten_once_they_are_added():
    rows, sums = torch.ones(2, 3, dtype=torch.float64), GramSum(3, device=CPU)
    sums.add(rows)
    rows.zero_()
    assert torch.equal(sums.result().triu(), torch.full((3, 3), 2.0, dtype=torch.float64).triu())


def test_the_result_may_be_asked_for_in_between():
    sums = GramSum(1, device=CPU)
    found = []
    for value in (1.0, 2.0, 3.0):
        sums.add(torch.tensor([[value]]))
        found.append(float(sums.result()))
    assert found == [1.0, 5.0, 14.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    sums = GramSum(2, device=CPU)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        sums.add(torch.tensor([[1.0, value]]))
