"""A truncation as the two factors that are stored, and how good these are: balance, cast, measure, join."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.files.dtypes import OPTIONS
from deltaspec.linalg.svd import Blocks
from deltaspec.types import LowRankDelta, Truncation

Factors = tuple[Tensor, Tensor]  # lora_A (r, d_in), lora_B (d_out, r), of a scaling of 1


def balance(truncation: Truncation, rank: int) -> LowRankDelta:
    """Split UΣVᵀ evenly at a rank: B = U√Σ and A = √ΣVᵀ, so that both factors have the same norm.

    Parameters
    ----------
    truncation : Truncation
    rank : int
        Directions to take from its top; all where it holds fewer.

    Returns
    -------
    LowRankDelta
        Float64, contiguous; ranks of one truncation are slices of each other.
    """
    root = truncation.singular_values[:rank].double().sqrt()
    lora_A = root[:, None] * truncation.right[:, :rank].double().mT
    return LowRankDelta(lora_A.contiguous(), (truncation.left[:, :rank].double() * root).contiguous())


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
    """
    if truncation.energy == 0.0:
        return 0.0
    if truncation.values is not None:
        rest, beyond = truncation.values[rank:], 0.0
    else:
        rest, beyond = truncation.singular_values[rank:], truncation.residual / (1 + truncation.excess) ** 2
    return math.sqrt((float(rest.double().flip(0).square().sum()) + beyond) / truncation.energy)


def cast_factors(factors: LowRankDelta, dtype: str) -> Factors:
    """Round factors to the dtype they are stored in, and refuse what does not fit it.

    Parameters
    ----------
    factors : LowRankDelta
        Float64.
    dtype : str
        bf16, fp16 or fp32.

    Returns
    -------
    lora_A : Tensor, (r, d_in)
    lora_B : Tensor, (d_out, r)

    Raises
    ------
    NumericalError
        If a factor holds NaN or infinity or overflows, or directions that carry more of ΔW than rounding loses
        anyway vanish; the caller adds the matrix's name.
    """
    kind = OPTIONS[dtype].torch
    pair, limits = (factors.lora_A.to(kind), factors.lora_B.to(kind)), torch.finfo(kind)
    for name, before, after in zip(("lora_A", "lora_B"), (factors.lora_A, factors.lora_B), pair, strict=True):
        if bool(torch.isfinite(after).all()):
            continue
        if not bool(torch.isfinite(before).all()):
            message = f"its {name} holds NaN or infinity before it is stored: check the checkpoints."
        else:
            top = float(before.abs().max())
            message = f"its {name} reaches {top:.3g}, above {dtype}'s largest, {limits.max:.3g}: use --dtype bf16."
        raise NumericalError(message)
    # A direction that vanishes in either factor vanishes from the product.
    weights = factors.lora_A.square().sum(1) * factors.lora_B.square().sum(0)
    gone = (weights > 0) & ~(pair[0].any(1) & pair[1].any(0))
    if float(weights[gone].sum()) > limits.eps**2 * float(weights.sum()):
        first = int(gone.nonzero()[0])
        top = float(min(factors.lora_A[first].abs().max(), factors.lora_B[:, first].abs().max()))
        message = (
            f"its direction {first + 1} of {len(gone)} has factors of at most {top:.3g}, below {dtype}'s smallest "
            f"number {limits.tiny * limits.eps:.3g}: use --dtype fp32."
        )
        raise NumericalError(message)
    return pair


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
    factors : sequence of (lora_A, lora_B)
        As stored, of any rank and dtype.
    device : torch.device
    energy : float, optional
        ‖ΔW‖²_F, summed in the same pass where it is not given. Of a zero ΔW the error of a zero product is 0, and that
        of any other infinite.

    Notes
    -----
    The difference itself, not ‖ΔW‖² - 2⟨ΔW, BA⟩ + ‖BA‖²: that loses all digits of errors under 1e-7, and took no less
    time (4096², one thread: r = 16 .070 s against .082, r = 64 .167 against .165).
    """
    pairs = [(lora_A.to(device).double(), lora_B.to(device).double()) for lora_A, lora_B in factors]
    sums = torch.zeros(len(pairs) + 1, dtype=torch.float64, device=device)  # the last is ‖ΔW‖²
    tall, start = shape[0] >= shape[1], 0
    scratch = torch.empty(0, dtype=torch.float64, device=device)
    for block in blocks():
        stop = start + block.shape[0 if tall else 1]
        if scratch.numel() < block.numel():
            scratch = torch.empty(block.numel(), dtype=torch.float64, device=device)
        room = scratch[: block.numel()]
        if energy is None:
            sums[-1] += block.square().sum()
        for i, (lora_A, lora_B) in enumerate(pairs):
            rows, columns = (lora_B[start:stop], lora_A) if tall else (lora_B, lora_A[:, start:stop])
            torch.addmm(block, rows, columns, alpha=-1, out=room.view(block.shape))
            sums[i] += torch.dot(room, room)
        start = stop
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
    """
    lora_A, lora_B = (factor.to(delta.lora_A.device).double() for factor in factors)
    left = torch.linalg.qr(torch.cat([delta.lora_B, -lora_B], dim=1), mode="r").R
    right = torch.linalg.qr(torch.cat([delta.lora_A, lora_A]).mT, mode="r").R
    return _relative(float((left @ right.mT).square().sum()), energy)


def _relative(squared_error: float, energy: float) -> float:
    if energy == 0.0:
        return math.inf if squared_error else 0.0
    return math.sqrt(squared_error / energy)


def pad(lora_A: Tensor, lora_B: Tensor, rank: int) -> Factors:
    """Add directions of zeros up to a rank; the product stays the same.

    Parameters
    ----------
    lora_A : Tensor, (r, d_in)
    lora_B : Tensor, (d_out, r)
    rank : int, at least r
    """
    more = rank - lora_A.shape[0]
    rows, columns = lora_A.new_zeros(more, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], more)
    return torch.cat([lora_A, rows]), torch.cat([lora_B, columns], dim=1)


def block_diagonal(parts: Sequence[tuple[Tensor, Tensor, Tensor]], *, rows: int) -> Factors:
    """Join the factors of a fused matrix's parts: their ranks add up, and each part writes only its own rows.

    Parameters
    ----------
    parts : sequence of (lora_A (r_i, d_in), lora_B (rows_i, r_i), row indices (rows_i,) in the whole)
        At least one; dtypes are the same.
    rows : int
        Of the whole matrix; those of no part stay zero.

    Returns
    -------
    lora_A : Tensor, (Σr_i, d_in)
    lora_B : Tensor, (rows, Σr_i)
    """
    lora_A = torch.cat([part for part, _, _ in parts])
    lora_B = lora_A.new_zeros(rows, lora_A.shape[0])
    start = 0
    for _, part, places in parts:
        lora_B[places, start : start + part.shape[1]] = part
        start += part.shape[1]
    return lora_A, lora_B
