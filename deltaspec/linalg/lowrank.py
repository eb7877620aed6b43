"""Exact decomposition of a low-rank product, without forming it."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.linalg.signs import fix_signs


def svd_of_product(lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B·A through two QRs and an r × r core: B = Q_B R_B, Aᵀ = Q_A R_A, core R_B R_Aᵀ.

    Parameters
    ----------
    lora_B : Tensor, (d_out, r), float64
    lora_A : Tensor, (r, d_in), float64

    Returns
    -------
    left : Tensor, (d_out, k)
    singular_values : Tensor, (k,), descending, k ≤ min(r, d_out, d_in)
    right : Tensor, (d_in, k)

    References
    ----------
    Golub & Van Loan, Matrix Computations, 4th ed., section 5.4 (QR before SVD).

    Examples
    --------
    >>> lora_B, lora_A = torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    >>> [round(value, 9) for value in svd_of_product(lora_B, lora_A)[1].tolist()]
    [10.0]
    """
    q_b, r_b = torch.linalg.qr(lora_B)
    q_a, r_a = torch.linalg.qr(lora_A.mT)
    u, singular_values, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    left, right = fix_signs(q_b @ u, q_a @ vt.mT)
    return left, singular_values, right
