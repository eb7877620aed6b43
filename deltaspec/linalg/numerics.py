"""Floating-point facts: the spacing of stored numbers, and where a tensor stops being finite."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.files.dtypes import DTYPES, GRIDS

# The integers as wide as a float dtype, and the bits of its exponent: neither sign nor mantissa.
_EXPONENT_MASK = {
    dtype.torch: (DTYPES[f"I{8 * dtype.width}"].torch, (1 << 8 * dtype.width - 1) - (1 << dtype.grid.mantissa))
    for dtype in DTYPES.values()
    if dtype.grid and dtype.computes
}


def binade(values: Tensor, *, dtype: str) -> Tensor:
    """Return 2^⌊log₂|w|⌋ of each value, float32: its spacing is this times 2^(-mantissa) on the grid of ``dtype``.

    Parameters
    ----------
    values : Tensor, any float dtype
        Stored values; subnormals have the spacing of the smallest normal number.
    dtype : str
        The name in GRIDS whose smallest normal exponent holds.

    Notes
    -----
    Clearing the mantissa bits leaves the power of two, one integer operation for each element.
    """
    if values.dtype not in _EXPONENT_MASK:
        values = values.float()  # fp8: exact
    integer, mask = _EXPONENT_MASK[values.dtype]
    power = (values.contiguous().view(integer) & mask).view(values.dtype).float()
    floor = GRIDS[dtype].min_exponent
    return power.clamp_min_(2.0**floor) if floor > -126 else power


def lies_on(values: Tensor, *, grid: str) -> bool:
    """Tell whether every value survives a round trip through the dtype named ``grid``.

    Parameters
    ----------
    values : Tensor, float64, float32 or float16

    Examples
    --------
    >>> lies_on(torch.tensor([1.0, 1.5]), grid="BF16"), lies_on(torch.tensor([1.001]), grid="BF16")
    (True, False)
    """
    dtype = DTYPES[grid].torch
    return bool(torch.equal(values.to(dtype).to(values.dtype), values))


def first_non_finite(values: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first NaN or infinity, or None.

    Parameters
    ----------
    values : Tensor, any float dtype

    Examples
    --------
    >>> first_non_finite(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]))
    (1, 0)
    """
    if values.dtype not in _EXPONENT_MASK:
        values = values.float()
    bad = (~torch.isfinite(values)).nonzero()
    return tuple(int(i) for i in bad[0]) if len(bad) else None
