"""Spacings of stored numbers, found by stepping to the next one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaspec.files.dtypes import GRIDS
from deltaspec.linalg.numerics import binade, first_non_finite, lies_on

INTEGERS = {
    "F64": (torch.float64, torch.int64),
    "F32": (torch.float32, torch.int32),
    "F16": (torch.float16, torch.int16),
    "BF16": (torch.bfloat16, torch.int16),
    "F8_E4M3": (torch.float8_e4m3fn, torch.int8),
    "F8_E5M2": (torch.float8_e5m2, torch.int8),
}


@pytest.mark.parametrize("dtype", INTEGERS)
def test_spacing_is_the_distance_to_the_next_number(dtype):
    """The next number away from zero has the next bit pattern; subnormals are among the values."""
    real, integer = INTEGERS[dtype]
    scales = [1.0, 1e-3, 3e-5, 0.02, 7.0] if dtype.startswith("F8") else [1.0, 1e-3, 6e-7, 0.02, 300.0]
    values = torch.cat([torch.randn(200, generator=torch.Generator().manual_seed(0)).double() * s for s in scales]).to(
        real
    )
    following = (values.view(integer) + 1).view(real)
    step = (following.double() - values.double()).abs()
    spacing = binade(values, dtype=dtype).double() * 2.0 ** -GRIDS[dtype].mantissa
    assert torch.equal(spacing, step)


def test_bfloat16_is_recognised_inside_float32():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    rounded = values.bfloat16().float()
    assert lies_on(rounded, grid="BF16")
    assert not lies_on(values, grid="BF16")
    rounded[50] = float(np.nextafter(np.float32(rounded[50]), np.float32(10)))
    assert not lies_on(rounded, grid="BF16")


def test_the_first_bad_index_is_found():
    values = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert first_non_finite(values) is None
    values[2, 1], values[1, 3] = float("inf"), float("nan")
    assert first_non_finite(values) == (1, 3)
    assert first_non_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)) == (1,)
