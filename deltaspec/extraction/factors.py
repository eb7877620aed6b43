"""A truncation as the two factors that are stored: balance, cast, pad, join."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.files.dtypes import OPTIONS
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

    Examples
    --------
    >>> from deltaspec.linalg.truncated import truncate_product
    >>> column, row = torch.tensor([[0.0], [2.0]]).double(), torch.tensor([[3.0, 0.0, 4.0]]).double()
    >>> factors = balance(truncate_product(column, row, rank=1), 1)
    >>> round(float(factors.lora_A.norm()), 6), round(float(factors.lora_B.norm()), 6)  # √σ each, and σ = 2·5
    (3.162278, 3.162278)
    """
    root = truncation.singular_values[:rank].double().sqrt()
    lora_A = root[:, None] * truncation.right[:, :rank].double().mT
    return LowRankDelta(lora_A.contiguous(), (truncation.left[:, :rank].double() * root).contiguous())


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


def pad(lora_A: Tensor, lora_B: Tensor, rank: int) -> Factors:
    """Add directions of zeros up to a rank; the product stays the same.

    Parameters
    ----------
    lora_A : Tensor, (r, d_in)
    lora_B : Tensor, (d_out, r)
    rank : int, at least r

    Returns
    -------
    lora_A : Tensor, (rank, d_in)
    lora_B : Tensor, (d_out, rank)

    Examples
    --------
    >>> lora_A, lora_B = pad(torch.ones(1, 3), torch.ones(2, 1), 2)
    >>> tuple(lora_A.shape), tuple(lora_B.shape), (lora_B @ lora_A).tolist()
    ((2, 3), (2, 2), [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
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

    Examples
    --------
    >>> part = torch.ones(1, 2), torch.ones(1, 1)
    >>> lora_A, lora_B = block_diagonal([(*part, torch.tensor([0])), (*part, torch.tensor([2]))], rows=3)
    >>> lora_B.tolist()
    [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    lora_A = torch.cat([part for part, _, _ in parts])
    lora_B = lora_A.new_zeros(rows, lora_A.shape[0])
    start = 0
    for _, part, places in parts:
        lora_B[places, start : start + part.shape[1]] = part
        start += part.shape[1]
    return lora_A, lora_B
