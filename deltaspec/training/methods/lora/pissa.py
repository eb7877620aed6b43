"""PiSSA: the factors start as the base's largest singular directions, which are taken out of the base meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaspec.linalg.svd import decompose
from deltaspec.training.methods.lora.adapted_linear import Factors


def principal_factors(matrix: Tensor, rank: int, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Compute A = √(S_r/s)·V_rᵀ and B = U_r·√(S_r/s), so that s·B·A is the best approximation of rank r.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
    rank : int, 1 ≤ r ≤ min(d_out, d_in)
    scaling : float
        s, the update's.

    Returns
    -------
    lora_A : Tensor, (r, d_in), float64
    lora_B : Tensor, (d_out, r), float64
        Zero beyond the matrix's own rank.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity.

    Notes
    -----
    All values are computed, not only the top ones, so that a stored adapter meets the same residual on any machine.

    References
    ----------
    Meng et al., PiSSA, NeurIPS 2024, equations 2-4.

    Examples
    --------
    >>> import torch
    >>> lora_A, lora_B = principal_factors(torch.diag(torch.tensor([1.0, 8.0])), 1, scaling=2.0)
    >>> 2.0 * lora_B @ lora_A
    tensor([[0., 0.],
            [0., 8.]], dtype=torch.float64)
    """
    values = matrix.detach().double()
    shape = (matrix.shape[0], matrix.shape[1])
    lora_A, lora_B = values.new_zeros(rank, shape[1]), values.new_zeros(shape[0], rank)
    spectrum, _ = decompose(lambda: [values.contiguous()], shape, device=matrix.device, vectors=rank)
    if spectrum.left is not None and spectrum.right is not None:
        found = spectrum.left.shape[1]
        root = (spectrum.singular_values[:found] / scaling).sqrt()
        lora_A[:found] = (spectrum.right * root).T.to(values)
        lora_B[:, :found] = (spectrum.left * root).to(values)
    return lora_A, lora_B


class Start(nn.Module):
    """The first factors, A₀ (r, d_in) and B₀ (d_out, r): the base acts without their product.

    It is subtracted beside that of the trained factors, so that the base's own weight stays what it was.

    Parameters
    ----------
    matrix : Tensor, (d_out, d_in)
        The base's; on meta nothing is computed.
    factors : Factors
        The trained ones, which are set to the start.
    """

    start_A: Tensor
    start_B: Tensor

    @torch.no_grad()
    def __init__(self, matrix: Tensor, factors: Factors) -> None:
        super().__init__()
        lora_A, lora_B, scaling = factors
        if not matrix.is_meta:
            found = principal_factors(matrix, len(lora_A), scaling=scaling)
            lora_A.copy_(found[0])
            lora_B.copy_(found[1])
        self.register_buffer("start_A", lora_A.detach().clone())
        self.register_buffer("start_B", lora_B.detach().clone())

    def subtract(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return [A; A₀] (2r, d_in) and [B, -B₀] (d_out, 2r), whose product is B·A - B₀·A₀."""
        return torch.cat([lora_A, self.start_A]), torch.cat([lora_B, -self.start_B], dim=1)
