"""The arithmetic of fp8 scales: which block of a tensor each one covers, what it is as a number, and the product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaspec.types import Shape

BLOCK = (128, 128)  # DeepSeek's, where nothing names one
EXPONENT_BIAS = 127  # of E8M0, OCP Microscaling Formats v1.0, section 5.4.1
NO_NUMBER = 255


def scale_grid(shape: Shape, scale: Shape) -> Shape:
    """Return a scale's shape with as many axes as its tensor: one for all, one per row or expert, or a grid.

    Trailing axes of one that the tensor lacks are dropped: musubi-tuner keeps (rows, blocks, 1) for a matrix.

    >>> scale_grid((4, 8), ()), scale_grid((4, 8), (4,)), scale_grid((256, 256), (2, 2)), scale_grid((4, 8), (4, 2, 1))
    ((1, 1), (4, 1), (2, 2), (4, 2))
    """
    if math.prod(scale) == 1:
        return (1,) * len(shape)
    while len(scale) > len(shape) and scale[-1] == 1:
        scale = scale[:-1]
    return scale + (1,) * (len(shape) - 1) if len(scale) == 1 else scale


def fit_block(shape: Shape, grid: Shape, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the block (rows, columns) with which a grid of scales covers a matrix; None where none does.

    Parameters
    ----------
    shape, grid : tuple of int
        Of the matrix and of its scales.
    stated : tuple of int, optional
        The block that is known; the last one of an axis may be partial. Where none is, 128 × 128 is tried first, then
        blocks of one size that fill each axis.

    Examples
    --------
    >>> fit_block((256, 300), (2, 3), (128, 128)), fit_block((256, 300), (2, 5), (128, 128))
    ((128, 128), None)
    >>> fit_block((256, 320), (256, 10), None)
    (1, 32)
    """
    sizes = []
    for length, count, size in zip(shape, grid, stated or BLOCK, strict=True):
        fitting = length if count == 1 else size if count == -(-length // size) else 1 if count == length else 0
        if not fitting and stated is None and count and length % count == 0:
            fitting = length // count
        if not fitting and length:
            return None
        sizes.append(max(fitting, 1))
    return sizes[0], sizes[1]


def fit_scale(shape: Shape, scale: Shape, stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the block of a tensor's scales over its last two axes; None where they do not fit."""
    grid = scale_grid(shape, scale)
    if math.prod(scale) == 1 and len(shape) < 2:
        return 1, 1
    if len(grid) != len(shape) or len(shape) < 2:
        return None
    leading = all(count in (1, length) for length, count in zip(shape[:-2], grid[:-2], strict=True))
    return fit_block(shape[-2:], grid[-2:], stated) if leading else None


def decode_scale(stored: Tensor) -> Tensor:
    """Return stored scales as numbers, float64; bytes are exponents, 2^(byte - 127), as E8M0 is where it has no dtype.

    >>> decode_scale(torch.tensor([126, 127, 128], dtype=torch.uint8))
    tensor([0.5000, 1.0000, 2.0000], dtype=torch.float64)
    """
    if stored.dtype != torch.uint8:
        return stored.to(torch.float64)
    return torch.exp2(stored.to(torch.float64) - EXPONENT_BIAS).masked_fill_(stored == NO_NUMBER, math.nan)


def dequantise(
    values: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Multiply stored values by the scale of their block: W_ij = values_ij · scale_⌊i/rows⌋⌊j/columns⌋.

    Parameters
    ----------
    values : Tensor, (…, m, n), any float dtype
    scale : Tensor, (…, ⌈d_out/block₀⌉, ⌈d_in/block₁⌉)
    block : tuple of int
        Rows and columns that share one scale; the last blocks may be partial.
    rows, columns : Tensor, (m,) and (n,), int64, optional
        Which rows and columns of the whole matrix ``values`` is; its first ones by default.

    Returns
    -------
    Tensor, (…, m, n), float64
        Exact: both factors have few enough digits.
    """
    rows = torch.arange(values.shape[-2]) if rows is None else rows
    columns = torch.arange(values.shape[-1]) if columns is None else columns
    scales = scale.to(torch.float64)[..., rows // block[0], :][..., columns // block[1]]
    return values.to(torch.float64).mul_(scales)
