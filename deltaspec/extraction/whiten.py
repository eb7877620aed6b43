"""Truncation that minimises the error which a layer's own inputs see, without inverting their second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.extraction.factor_errors import locate_blocks, stored_errors
from deltaspec.extraction.factors import Factors
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.streamed import Blocks, Streamed
from deltaspec.linalg.truncated import Rank, truncate
from deltaspec.types import LowRankDelta, Truncation

JITTER = 2.0**-20  # relative to ‖S‖: above what float32 storage of S can make negative
BLOCK = 1 << 19  # elements of a block of it: 4 MB
STRIP = 512  # columns of T that are taken together
WHOLE = 1 << 27  # elements of ΔW·T that are kept rather than formed anew in every pass: 1 GiB


@dataclass(frozen=True, slots=True)
class Weighted:
    """ΔW·T with T·Tᵀ = S, the second moments of the inputs: its plain norm is ΔW's weighted one.

    ``blocks`` yields ΔW·T as it would ΔW, of the same ``shape``; ``root`` is T (d_in, d_in), lower triangular.
    """

    blocks: Blocks
    shape: tuple[int, int]
    root: Tensor


@dataclass(frozen=True, slots=True)
class WeightedTruncation:
    """The best approximations of ΔW for inputs of second moments S, of all ranks up to r.

    ``truncation`` is that of ΔW·T: its energy, residual, excess and values are weighted ones. ``projected`` (r, d_in)
    is UᵀΔW with U its left vectors; ``energy`` is the plain ‖ΔW‖²_F. ``weighted`` measures stored factors.
    """

    truncation: Truncation
    projected: Tensor
    energy: float
    weighted: Weighted


def weigh(blocks: Blocks, shape: tuple[int, int], moments: Tensor, *, device: torch.device) -> Weighted:
    """Form ΔW·T, with T the Cholesky factor of the second moments S.

    Parameters
    ----------
    blocks : callable
        Each call starts again over ΔW in float64 blocks on ``device`` along its longer axis.
    shape : (d_out, d_in)
    moments : Tensor, (d_in, d_in)
        S = Σ x·xᵀ or a multiple of it, symmetric positive semi-definite, singular or not. Where it is zero, no input
        was seen, and all directions weigh alike.
    device : torch.device

    Raises
    ------
    NumericalError
        If S has another shape, holds NaN or infinity, or has clearly negative eigenvalues.

    Examples
    --------
    >>> delta, moments = torch.ones(1, 2).double(), torch.diag(torch.tensor([4.0, 9.0]))
    >>> weighted = weigh(lambda: iter([delta]), (1, 2), moments, device=torch.device("cpu"))
    >>> torch.cat(list(weighted.blocks()), dim=1).round(decimals=6).tolist()
    [[2.0, 3.0]]
    """
    root = factor_moments(moments.to(device), shape[1])
    if shape[0] * shape[1] > WHOLE and shape[0] >= shape[1]:
        return Weighted(lambda: (block @ root for block in blocks()), shape, root)
    return Weighted(partial(_cut, _product(blocks, shape, root)), shape, root)


def factor_moments(moments: Tensor, d_in: int) -> Tensor:
    """Return lower triangular T with T·Tᵀ = S + δ·I, δ = ‖S‖·d_in·eps·8ᵏ with the least k that lets it be factored.

    Parameters
    ----------
    moments : Tensor, (d_in, d_in), symmetric
    d_in : int

    Raises
    ------
    NumericalError
        If S has another shape, holds NaN or infinity, or δ would exceed 2⁻²⁰·‖S‖: then it is not semi-definite.

    Notes
    -----
    T is never inverted, so that S may be singular, and any T of this product serves. A Cholesky factor took .24 s at
    2048², an eigendecomposition 4.2; δ gives directions that no input has a weight at the level of S's rounding. The
    error that inputs see exceeded the optimum by at most 2e-5, with outlier channels 10⁴ above the rest.

    Examples
    --------
    >>> factor_moments(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), 2).round(decimals=6).tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    scale = _check_moments(moments, d_in)
    shifted = moments.double().clone()
    if scale == 0.0:
        return shifted.fill_diagonal_(1.0)
    jitter = d_in * float(torch.finfo(torch.float64).eps)
    while jitter <= JITTER:
        shifted.diagonal().copy_(moments.diagonal()).add_(jitter * scale)
        found = torch.linalg.cholesky_ex(shifted)
        if not int(found.info):
            root: Tensor = found.L
            return root
        jitter *= 8
    least = float(torch.linalg.eigvalsh(moments.double())[0])
    message = (
        f"the second moments of its inputs have an eigenvalue of {least:.3g} beside a norm of {scale:.3g}, "
        "expected none below 0: calibrate again."
    )
    raise NumericalError(message)


def _check_moments(moments: Tensor, d_in: int) -> float:
    """Return ‖S‖ of second moments that are finite and of the right shape."""
    if tuple(moments.shape) != (d_in, d_in):
        message = f"the second moments of its inputs have shape {tuple(moments.shape)}, expected ({d_in}, {d_in})."
        raise NumericalError(message)
    scale = float(torch.linalg.matrix_norm(moments.double()))
    if not scale < float("inf"):
        message = "the second moments of its inputs hold NaN or infinity: calibrate again."
        raise NumericalError(message)
    return scale


def _cut(matrix: Tensor) -> Iterator[Tensor]:
    """Cut a matrix into blocks along its longer axis."""
    axis = 0 if matrix.shape[0] >= matrix.shape[1] else 1
    long, step = matrix.shape[axis], max(64, BLOCK // max(min(matrix.shape), 1))
    return (matrix.narrow(axis, i, min(step, long - i)).contiguous() for i in range(0, long, step))


def _product(blocks: Blocks, shape: tuple[int, int], root: Tensor) -> Tensor:
    """Form ΔW·T whole, leaving out most of what T's zeros would add: up to half the work."""
    product, tall = torch.zeros(shape, dtype=torch.float64, device=root.device), shape[0] >= shape[1]
    for span, block in locate_blocks(blocks, shape):
        if tall:
            for at in range(0, shape[1], STRIP):
                product[span, at : at + STRIP] = block[:, at:] @ root[at:, at : at + STRIP]
        else:
            product[:, : span.stop].addmm_(block, root[span, : span.stop])
    return product


def truncate_weighted(
    blocks: Blocks, shape: tuple[int, int], moments: Tensor, *, device: torch.device, rank: Rank
) -> WeightedTruncation:
    """Minimise ‖(ΔW - M)·S^½‖_F over M of rank r: M = U·UᵀΔW with U the top left singular vectors of ΔW·T.

    Parameters
    ----------
    blocks : callable
        Each call starts again over ΔW in float64 blocks on ``device`` along its longer axis.
    shape : (d_out, d_in)
    moments : Tensor, (d_in, d_in)
        As ``weigh`` takes them.
    device : torch.device
    rank : int or callable
        The largest rank wanted; a callable chooses it from all singular values of ΔW·T.

    Raises
    ------
    NumericalError
        If ΔW or S holds NaN or infinity, S is not semi-definite, or nothing converges.

    References
    ----------
    Wang et al., SVD-LLM, ICLR 2025, section 3.1, for the inverting form [ΔW·T]_r·T⁻¹: the same M where T has one.
    """
    weighted = weigh(blocks, shape, moments, device=device)
    truncation = truncate(Streamed(weighted.blocks, shape, device), rank=rank)
    projected, energy = _project(blocks, truncation.left.to(device), shape)
    return WeightedTruncation(truncation, projected.cpu(), energy, weighted)


def _project(blocks: Blocks, left: Tensor, shape: tuple[int, int]) -> tuple[Tensor, float]:
    """UᵀΔW and ‖ΔW‖² in one pass."""
    projected, energy, tall = left.new_zeros(left.shape[1], shape[1]), left.new_zeros(()), shape[0] >= shape[1]
    for span, block in locate_blocks(blocks, shape):
        if tall:
            projected.addmm_(left[span].mT, block)
        else:
            projected[:, span] = left.mT @ block
        energy += block.square().sum()
    return projected, float(energy)


def balance_weighted(found: WeightedTruncation, rank: int) -> LowRankDelta:
    """Split U·UᵀΔW evenly at a rank, through the singular values of the product itself.

    Parameters
    ----------
    found : WeightedTruncation
    rank : int
        Directions to take from its top; all where it holds fewer.

    Returns
    -------
    LowRankDelta
        Float64; unlike those of a plain truncation, factors of one rank are no slices of another's.
    """
    left, values, right = svd_of_product(found.truncation.left[:, :rank].contiguous(), found.projected[:rank])
    root = values.sqrt()
    return LowRankDelta((root[:, None] * right.mT).contiguous(), (left * root).contiguous())


def weighted_errors(
    weighted: Weighted, factors: Sequence[Factors], *, device: torch.device, energy: float | None = None
) -> list[float]:
    """Measure ‖(ΔW - B·A)·S^½‖_F/‖ΔW·S^½‖_F of stored factors, in float64.

    Parameters
    ----------
    weighted : Weighted
    factors : sequence of (lora_A, lora_B)
        As stored, of any rank and dtype.
    device : torch.device
    energy : float, optional
        ‖ΔW·S^½‖²_F, where it is known: the energy of the weighted truncation.

    Returns
    -------
    list of float
        One for each pair of factors.
    """
    seen = [(lora_A.to(device).double() @ weighted.root, lora_B) for lora_A, lora_B in factors]
    return stored_errors(weighted.blocks, weighted.shape, seen, device=device, energy=energy)
