"""How far stored factors are from ΔW, and how near to it anything of their rank can be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deltaspec.extraction.factors import Factors
from deltaspec.linalg.streamed import Blocks
from deltaspec.types import LowRankDelta, Truncation


def optimum(truncation: Truncation, rank: int) -> float:
    """Relative error of the best approximation of a rank, √(Σ_{i>r} σᵢ²)/‖ΔW‖: what nothing of that rank can beat.

    Parameters
    ----------
    truncation : Truncation
        With all singular values it is exact; otherwise its own residual, less its estimated excess.
    rank : int
        At most that of the truncation, unless it holds all values.

    References
    ----------
    Eckart & Young, The approximation of one matrix by another of lower rank, Psychometrika 1936.

    Examples
    --------
    >>> from deltaspec.linalg.truncated import truncate_product
    >>> delta = torch.diag(torch.tensor([4.0, 3.0])).double()
    >>> round(optimum(truncate_product(delta, torch.eye(2).double(), rank=2), 1), 6)
    0.6
    """
    if truncation.energy == 0.0:
        return 0.0
    if truncation.values is not None:
        rest, beyond = truncation.values[rank:], 0.0
    else:
        rest, beyond = truncation.singular_values[rank:], truncation.residual / (1 + truncation.excess) ** 2
    return math.sqrt((float(rest.double().flip(0).square().sum()) + beyond) / truncation.energy)


def locate_blocks(blocks: Blocks, shape: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block of a streamed matrix with the place that it has along the longer axis.

    Parameters
    ----------
    blocks : callable
        Returns blocks of rows of a tall matrix, of columns of a wide one.
    shape : (d_out, d_in)

    Examples
    --------
    >>> halves = lambda: iter(torch.zeros(4, 2).split(2))
    >>> [(span.start, span.stop, tuple(block.shape)) for span, block in locate_blocks(halves, (4, 2))]
    [(0, 2, (2, 2)), (2, 4, (2, 2))]
    """
    axis, start = (0 if shape[0] >= shape[1] else 1), 0
    for block in blocks():
        stop = start + block.shape[axis]
        yield slice(start, stop), block
        start = stop


def stored_errors(
    blocks: Blocks,
    shape: tuple[int, int],
    factors: Sequence[Factors],
    *,
    device: torch.device,
    energy: float | None = None,
) -> list[float]:
    """Measure the relative error ‖ΔW - B·A‖_F/‖ΔW‖_F of stored factors in float64, in one pass over ΔW.

    Parameters
    ----------
    blocks : callable
        Each call starts again over ΔW in float64 blocks on ``device`` along its longer axis: rows of a tall ΔW,
        columns of a wide one; they are read, not written.
    shape : (d_out, d_in)
    factors : sequence of (lora_A, lora_B), as stored, of any rank and dtype
    device : torch.device
    energy : float, optional
        ‖ΔW‖²_F, summed in the same pass where it is not given. Of a zero ΔW the error of a zero product is 0, and that
        of any other infinite.

    Examples
    --------
    >>> delta, factors = torch.eye(2).double(), (torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    >>> stored_errors(lambda: iter([delta]), (2, 2), [factors], device=torch.device("cpu"))
    [0.7071067811865476]
    """
    # The difference itself, not ‖ΔW‖² - 2⟨ΔW, BA⟩ + ‖BA‖²: that loses all digits of errors under 1e-7, and took no
    # less time (4096², one thread: r = 16 .070 s against .082, r = 64 .167 against .165).
    pairs = [(lora_A.to(device).double(), lora_B.to(device).double()) for lora_A, lora_B in factors]
    tall, scratch = shape[0] >= shape[1], torch.empty(0, dtype=torch.float64, device=device)
    sums = scratch.new_zeros(len(pairs) + 1)  # the last is ‖ΔW‖²
    for span, block in locate_blocks(blocks, shape):
        if scratch.numel() < block.numel():
            scratch = scratch.new_empty(block.numel())
        room = scratch[: block.numel()]
        if energy is None:
            sums[-1] += block.square().sum()
        for i, (lora_A, lora_B) in enumerate(pairs):
            rows, columns = (lora_B[span], lora_A) if tall else (lora_B, lora_A[:, span])
            torch.addmm(block, rows, columns, alpha=-1, out=room.view(block.shape))
            sums[i] += torch.dot(room, room)
    *found, total = sums.tolist()
    return [_relative(value, total if energy is None else energy) for value in found]


def product_error(delta: LowRankDelta, factors: Factors, *, energy: float) -> float:
    """Measure ‖ΔW - B·A‖_F/‖ΔW‖_F where ΔW is itself a low-rank product; neither is formed.

    Parameters
    ----------
    delta : LowRankDelta
        ΔW, float64.
    factors : (lora_A, lora_B)
        As stored.
    energy : float
        ‖ΔW‖²_F.

    Notes
    -----
    [B₁ -B₂]·[A₁; A₂] has the norm of R_B·R_Aᵀ, with R of the QR of either stack.

    Examples
    --------
    >>> delta = LowRankDelta(torch.eye(2).double(), torch.diag(torch.tensor([4.0, 3.0])).double())
    >>> round(product_error(delta, (torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0], [0.0]])), energy=25.0), 6)
    0.6
    """
    lora_A, lora_B = (factor.to(delta.lora_A.device).double() for factor in factors)
    left = torch.linalg.qr(torch.cat([delta.lora_B, -lora_B], dim=1), mode="r").R
    right = torch.linalg.qr(torch.cat([delta.lora_A, lora_A]).mT, mode="r").R
    return _relative(float((left @ right.mT).square().sum()), energy)


def _relative(squared_error: float, energy: float) -> float:
    if energy == 0.0:
        return math.inf if squared_error else 0.0
    return math.sqrt(squared_error / energy)
