"""Floating-point facts: the spacing of stored numbers, and where a tensor stops being finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """A storage dtype's number grid: mantissa bits below the leading one, and its smallest normal exponent."""

    mantissa: int
    min_exponent: int


GRIDS = {
    "F64": Grid(52, -1022),
    "F32": Grid(23, -126),
    "F16": Grid(10, -14),
    "BF16": Grid(7, -126),
    "F8_E4M3": Grid(3, -6),
    "F8_E5M2": Grid(2, -14),
}
# Dtypes whose values are often upcast on saving: stored dtype → coarser grids that its values may lie on.
UPCAST = {"F64": ("F32", "F16", "BF16"), "F32": ("F16", "BF16"), "F16": ("BF16",)}
_EXPONENT_MASK = {
    torch.float64: (torch.int64, 0x7FF0 << 48),
    torch.float32: (torch.int32, 0x7F80 << 16),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
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
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[grid]
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
