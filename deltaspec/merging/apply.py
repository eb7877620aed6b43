"""W + ΔW, summed once and rounded once, with what the rounding lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.errors import NumericalError

BLOCK = 1 << 16  # elements of a block: half a megabyte in float64, so that the passes over it stay in cache
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """What storing W' = round(W + ΔW) kept of ΔW; sums, so that losses of several matrices add up.

    ``update`` = ‖ΔW‖², ``error`` = ‖(W' - W) - ΔW‖², both float64, in squared units of the weights; ``unchanged`` of
    the ``elements`` are what they were.

    Examples
    --------
    >>> total = Loss(update=4.0, error=1.0, unchanged=3, elements=10) + Loss(5.0, 0.0, 7, 10)
    >>> round(total.relative, 4), total.unchanged_share
    (0.3333, 0.5)
    """

    update: float = 0.0
    error: float = 0.0
    unchanged: int = 0
    elements: int = 0

    def __add__(self, other: Loss) -> Loss:
        """Add up the sums of two matrices."""
        return Loss(
            self.update + other.update,
            self.error + other.error,
            self.unchanged + other.unchanged,
            self.elements + other.elements,
        )

    @property
    def relative(self) -> float | None:
        """‖(W' - W) - ΔW‖ / ‖ΔW‖; None where ΔW is zero."""
        return math.sqrt(self.error / self.update) if self.update else None

    @property
    def unchanged_share(self) -> float:
        """Share of elements that are what they were."""
        return self.unchanged / self.elements if self.elements else 1.0


def merge_block(
    weight: Tensor, update: Tensor, *, dtype: torch.dtype, whole: Tensor | None = None, share: float = 1.0
) -> tuple[Tensor, Loss]:
    """Return W' = round(W + share·(whole - W) + update) and what rounding lost of the change.

    Parameters
    ----------
    weight : Tensor, any float dtype
        W as stored; the sum is formed in float64 where W is float64, else in float32.
    update : Tensor, float64, same shape
    dtype : torch.dtype
        Of W'.
    whole : Tensor, any float dtype, same shape, optional
        What replaces W: entirely where ``share`` is 1, else by that share.
    share : float

    Returns
    -------
    merged : Tensor, same shape
    loss : Loss

    Raises
    ------
    NumericalError
        If W, the change, or W' in its dtype is not finite.

    Examples
    --------
    >>> weight, update = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 2.0**-9, dtype=torch.float64)
    >>> merged, loss = merge_block(weight, update, dtype=torch.bfloat16)
    >>> float(merged), loss.relative, loss.unchanged_share
    (1.0, 1.0, 1.0)
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    before, change, start = weight.double(), update, weight.to(wide)
    if whole is not None:
        start = whole.to(wide) if share == 1 else torch.lerp(before, whole.double(), share).to(wide)
        change = (whole.double() - before).mul_(share).add_(update)
    merged = start.add(update.to(wide)).to(dtype)
    moved = merged.double() - before  # not in place: merged may be float64 itself
    changed = moved.sign().abs_().sum()  # a count in float64: half the time of count_nonzero
    update_energy, error = _energy(change), _energy(moved.sub_(change))
    if not math.isfinite(error + update_energy):
        raise NumericalError(_reason(before, change, merged))
    return merged, Loss(update_energy, error, moved.numel() - int(changed), moved.numel())


@dataclass(frozen=True, slots=True)
class Summands:
    """What W' = W + share·(whole - W) + update is made of, each read by rows.

    Attributes
    ----------
    weight, update, whole : callable
        From start and stop to these rows, (stop - start, d_in); dtypes as of ``merge_block``.
    share : float
        By which ``whole``, where there is one, replaces W.
    """

    weight: Rows
    update: Rows
    whole: Rows | None = None
    share: float = 1.0


def merge_rows(
    summands: Summands, store: Callable[[int, int, Tensor], None], *, shape: tuple[int, int], dtype: torch.dtype
) -> Loss:
    """Merge one matrix by blocks of rows.

    Parameters
    ----------
    summands : Summands
    store : callable
        Takes start, stop and the merged rows.
    shape : tuple of int
        (d_out, d_in).
    dtype : torch.dtype
        Of W'.

    Raises
    ------
    NumericalError
        As ``merge_block``.

    Examples
    --------
    >>> weight, update, out = torch.ones(2, 2), torch.full((2, 2), 0.5, dtype=torch.float64), torch.empty(2, 2)
    >>> summands = Summands(lambda i, j: weight[i:j], lambda i, j: update[i:j])
    >>> loss = merge_rows(summands, lambda i, j, rows: out[i:j].copy_(rows), shape=(2, 2), dtype=torch.float32)
    >>> out.tolist(), loss.update, loss.error
    ([[1.5, 1.5], [1.5, 1.5]], 1.0, 0.0)
    """
    loss = Loss()
    for start, stop in row_blocks(shape):
        whole = None if summands.whole is None else summands.whole(start, stop)
        weight, update = summands.weight(start, stop), summands.update(start, stop)
        merged, lost = merge_block(weight, update, dtype=dtype, whole=whole, share=summands.share)
        store(start, stop, merged)
        loss += lost
    return loss


def row_blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows, in order, each of about BLOCK elements and at least one row.

    Examples
    --------
    >>> list(row_blocks((5, 32768)))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, BLOCK // max(shape[1], 1))
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _energy(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def _reason(before: Tensor, change: Tensor, merged: Tensor) -> str:
    for what, values in (("the base holds", before), ("the adapter holds", change)):
        if not bool(torch.isfinite(values).all()):
            return f"{what} NaN or infinity"
    largest = float((before + change).abs().max())
    kind = str(merged.dtype).removeprefix("torch.")
    return f"values up to {largest:.3g} do not fit {kind}; pass --dtype bf16 or fp32"
