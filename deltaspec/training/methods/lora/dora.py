"""DoRA: each row of W + scaling·B·A at a learned length. Its lengths without the sum, and the dense change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaspec.training.methods.lora.adapted_linear import Factors
from deltaspec.training.sites.attachment import make_parameter


def square_rows(matrix: Tensor) -> Tensor:
    """Return ‖row‖² of each row (d_out,), summed in float64; once per base weight.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)

    Examples
    --------
    >>> import torch
    >>> square_rows(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([25.,  1.], dtype=torch.float64)
    """
    squares: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64).square()
    return squares


def row_lengths(matrix: Tensor, squares: Tensor, factors: Factors) -> Tensor:
    """Compute ‖row‖ of W + s·B·A as √(‖w‖² + s·b·(2·A·w + s·A·Aᵀ·b)), without gradient and without forming B·A.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
        W, in the factors' dtype.
    squares : Tensor, (d_out,)
        Its ``square_rows``.
    factors : Factors
        A, B and s.

    Returns
    -------
    Tensor
        (d_out,), in the factors' dtype, never zero.

    Notes
    -----
    2·d_out·d_in·r operations. The square is wrong by about eps·(‖w‖ + ‖s·b·A‖)², so a length by
    eps·(‖w‖ + ‖s·b·A‖)² / length: as good as the dense norm unless the update cancels the row.

    Examples
    --------
    >>> import torch
    >>> matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> factors = Factors(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0], [0.0]]), 2.0)
    >>> row_lengths(matrix, square_rows(matrix), factors)
    tensor([5., 1.])
    """
    lora_A, lora_B, scaling = factors
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        inner = (matrix @ lora_A.T).mul_(2.0).addmm_(lora_B, lora_A @ lora_A.T, alpha=scaling)
        found = inner.mul_(lora_B).sum(1).mul_(scaling).add_(squares.to(inner.dtype))
        return found.clamp_min_(torch.finfo(found.dtype).tiny).sqrt_()


def dense_change(matrix: Tensor, magnitude: Tensor, factors: Factors) -> Tensor:
    """Compute ΔW = magnitude ⊙ (W + s·B·A)/‖W + s·B·A‖ - W in float64, of full rank.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
    magnitude : Tensor, (d_out,)
    factors : Factors
        A, B and s.

    Returns
    -------
    Tensor, (d_out, d_in), float64
        In units of the weights.

    References
    ----------
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, equation 5; rows are outputs, as in its code.

    Examples
    --------
    >>> import torch
    >>> still = Factors(torch.ones(1, 2), torch.zeros(2, 1), 1.0)
    >>> dense_change(torch.eye(2), torch.tensor([1.0, 3.0]), still)
    tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64)
    """
    lora_A, lora_B, scaling = factors
    with torch.no_grad():
        base = matrix.double()
        moved = torch.addmm(base, lora_B.double(), lora_A.double(), alpha=scaling)
        lengths = torch.linalg.vector_norm(moved, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        return moved.mul_((magnitude.double() / lengths)[:, None]).sub_(base)


class Lengths(nn.Module):
    """The learned length of each row of W + s·B·A, ``magnitude`` (d_out,); at the start those of W.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
        W.
    """

    squares: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        squares = torch.empty(len(matrix), device="meta") if matrix.is_meta else square_rows(matrix).float()
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = make_parameter((len(matrix),), matrix, lambda t: t.copy_(squares.sqrt()))

    def stretch(self, matrix: Tensor, factors: Factors) -> Tensor:
        """Return the factor of each output (d_out,): magnitude / ‖row‖, the length without gradient."""
        return self.magnitude / row_lengths(matrix.to(factors.lora_A.dtype), self.squares, factors)
