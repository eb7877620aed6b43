"""DoRA: each row of W + scaling·B·A at a learned length. Its lengths without the sum, and the dense change."""

from __future__ import annotations

import torch
from torch import Tensor


def square_rows(matrix: Tensor) -> Tensor:
    """Return ‖row‖² of each row (d_out,), summed in float64; once per base weight.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
    """
    squares: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64).square()
    return squares


def row_lengths(matrix: Tensor, squares: Tensor, *, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute ‖row‖ of W + s·B·A as √(‖w‖² + s·b·(2·A·w + s·A·Aᵀ·b)), without gradient and without forming B·A.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
        W, in the factors' dtype.
    squares : Tensor, (d_out,)
        Its ``square_rows``.
    lora_A : Tensor, (r, d_in)
    lora_B : Tensor, (d_out, r)
    scaling : float
        s.

    Returns
    -------
    Tensor
        (d_out,), in the factors' dtype, never zero.

    Notes
    -----
    2·d_out·d_in·r operations. The square is wrong by about eps·(‖w‖ + ‖s·b·A‖)², so a length by
    eps·(‖w‖ + ‖s·b·A‖)² / length: as good as the dense norm unless the update cancels the row.
    """
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        inner = (matrix @ lora_A.T).mul_(2.0).addmm_(lora_B, lora_A @ lora_A.T, alpha=scaling)
        found = inner.mul_(lora_B).sum(1).mul_(scaling).add_(squares.to(inner.dtype))
        return found.clamp_min_(torch.finfo(found.dtype).tiny).sqrt_()


def dense_change(matrix: Tensor, magnitude: Tensor, *, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Compute ΔW = magnitude ⊙ (W + s·B·A)/‖W + s·B·A‖ - W in float64, of full rank.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
    magnitude : Tensor, (d_out,)
    lora_A : Tensor, (r, d_in)
    lora_B : Tensor, (d_out, r)
    scaling : float

    References
    ----------
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, equation 5; rows are outputs, as in its code.
    """
    with torch.no_grad():
        base = matrix.double()
        moved = torch.addmm(base, lora_B.double(), lora_A.double(), alpha=scaling)
        lengths = torch.linalg.vector_norm(moved, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return moved.mul_((magnitude.double() / lengths)[:, None]).sub_(base)
