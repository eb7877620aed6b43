"""PiSSA: the factors start as the base's largest singular directions, which are taken out of the base meanwhile."""

from __future__ import annotations

from torch import Tensor

from deltaspec.linalg.svd import decompose


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
