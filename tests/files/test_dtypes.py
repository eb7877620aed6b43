"""The table of dtypes against torch itself, the options, and safetensors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from deltaspec.files.dtypes import DTYPES, GRIDS, OPTIONS, name_of
from deltaspec.options import DTYPES as CHOICES

HERE = [dtype for dtype in DTYPES.values() if hasattr(torch, dtype.kind)]


@pytest.mark.parametrize("dtype", HERE, ids=lambda dtype: dtype.name)
def test_every_row_is_what_torch_and_safetensors_say(dtype):
    assert dtype.torch.itemsize == dtype.width
    assert name_of(dtype.torch) == dtype.name
    if dtype.storable:
        header = save({"x": torch.zeros(2, dtype=torch.uint8).repeat(8)[: 2 * dtype.width].view(dtype.torch)})
        assert f'"dtype":"{dtype.name}"'.encode() in header


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_those_of_torch(name):
    limits, grid = torch.finfo(DTYPES[name].torch), GRIDS[name]
    assert limits.eps == 2.0**-grid.mantissa
    assert math.log2(limits.smallest_normal) == grid.min_exponent
    assert all(GRIDS[coarser].mantissa < grid.mantissa for coarser in grid.coarser)


def test_options_are_the_ones_that_the_command_takes():
    assert {"auto", *OPTIONS} == set(CHOICES)
    assert {name for name, dtype in DTYPES.items() if dtype.computes} == {"F64", "F32", "F16", "BF16"}


def test_the_table_needs_no_torch():
    code = "import sys, deltaspec.files.dtypes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
