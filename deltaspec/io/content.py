"""Whether two stored tensors are one weight."""

from __future__ import annotations

import torch

from deltaspec.io.matrix import read_tensor
from deltaspec.types import TensorSpec

ROWS = 4096


def same_content(first: TensorSpec, second: TensorSpec) -> bool:
    """Tell whether two tensors hold the same values and scales; stops at the first block that differs.

    Parameters
    ----------
    first, second : TensorSpec
        Of one shape and dtype.
    """
    if (first.scale is None) != (second.scale is None):
        return False
    if first.scale and second.scale and not same_content(first.scale, second.scale):
        return False
    one, other = read_tensor(first), read_tensor(second)
    if one.ndim == 0:
        return bool(one == other)
    return all(
        torch.equal(one[start : start + ROWS], other[start : start + ROWS]) for start in range(0, one.shape[0], ROWS)
    )
