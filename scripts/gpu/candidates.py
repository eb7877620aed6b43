"""What bench_gpu.py times beside deltaspec's own routes: Gram matrices, top subspaces, two-stage eigenvalues."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deltaspec.linalg.openblas import find_openblas


def delta(kind: str, rows: int, columns: int, device: str, seed: int = 0) -> Tensor:
    """Make a change in float32: "ft" and "lora" as bf16 weights would show it, "flat" Gaussian."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if kind == "flat":
        return normal(rows, columns)
    weight = normal(rows, columns) * 0.02
    base = weight.to(torch.bfloat16)
    rank = 16 if kind == "lora" else min(256, min(rows, columns) // 4)
    decay = torch.arange(1, rank + 1, device=device) ** -0.7
    if kind == "lora":
        decay = torch.logspace(0, -1, rank, device=device)
    update = (normal(rows, rank) * decay) @ normal(rank, columns)
    update *= (rows * columns) ** 0.5 * (5e-4 if kind == "lora" else 2e-4) / update.norm()
    if kind == "ft":
        update += normal(rows, columns) * 1e-4
    return (base.float() + update).to(torch.bfloat16).float() - base.float()


def gram_lower(matrix: Tensor, width: int = 1024, chunk: int = 1 << 30) -> Tensor:
    """Lower triangle of XᵀX in float64 by blocks of columns, over chunks of rows; half the work of a product."""
    side = matrix.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], chunk):
        rows = matrix[start : start + chunk].double()
        for i in range(0, side, width):
            gram[i:, i : i + width].addmm_(rows[:, i:].mT, rows[:, i : i + width])
    return gram


def gram_fp32(matrix: Tensor, chunk: int = 256) -> Tensor:
    """XᵀX from float32 products over few rows each, summed in float64."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], chunk):
        rows = matrix[start : start + chunk]
        gram += rows.mT @ rows
    return gram


def gram_int8(matrix: Tensor, slices: int) -> Tensor:
    """XᵀX as Ozaki does it: columns scaled by powers of two, int8 slices, exact int32 products, float64 sum."""
    side = matrix.shape[1]
    exponent = torch.ceil(torch.log2(matrix.abs().amax(0).clamp_min(1e-30))).double()
    rest, pieces = matrix.double() * torch.exp2(6 - exponent), []
    for _ in range(slices):
        digit = rest.round().clamp_(-127, 127)
        pieces.append(digit.to(torch.int8).mT.contiguous())
        rest = (rest - digit) * 128
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for i in range(slices):
        for j in range(i, slices):  # sums stay below 64·64·rows < 2³¹
            product = torch._int_mm(pieces[i], pieces[j].mT).double() * 2.0 ** (-12 - 7 * (i + j))
            gram += product if i == j else product + product.mT
    scale = torch.exp2(exponent)
    return gram * scale[:, None] * scale[None, :]


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormalise by Cholesky of the float64 Gram matrix, by QR where that fails."""
    wide = columns.double()
    factor, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    if int(info):
        return torch.linalg.qr(columns)[0]
    return torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.to(columns.dtype)


def orthonormal32(columns: Tensor) -> Tensor:
    """Orthonormalise in float32 by a shifted Cholesky; roughly only."""
    gram = (columns.mT @ columns).double()
    gram.diagonal().add_(1e-7 * gram.diagonal().max())
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor.to(columns.dtype), columns.mT, upper=False).mT


def block_krylov(
    multiply: Callable[[Tensor], Tensor], start: Tensor, steps: int, orthonormalise: Callable[[Tensor], Tensor]
) -> Tensor:
    """Orthonormal basis of the block Krylov space of a symmetric matrix, never over-complete."""
    block = orthonormalise(multiply(start))
    basis = block
    for _ in range(min(steps, start.shape[0] // (2 * start.shape[1]) - 1)):
        block = multiply(block)
        for _ in range(2):
            block = orthonormalise(block - basis @ (basis.mT @ block))
        basis = torch.cat((basis, block), 1)
    return basis


def to_band(gram: Tensor, band: int) -> Tensor:
    """Reduce a symmetric matrix to a band by Householder blocks, nearly all of it products; row j holds column j."""
    side = gram.shape[0]
    matrix, unit = gram.clone(), torch.eye(band, dtype=gram.dtype, device=gram.device)
    for k in range(0, side - band - 1, band):
        panel = matrix[k + band :, k : k + band]
        width = min(band, panel.shape[0])
        reflected, tau = torch.geqrf(panel)
        vectors = torch.tril(reflected, -1)[:, :width]
        vectors[:width, :width] += unit[:width, :width]
        inverse = torch.triu(vectors.mT @ vectors, 1) + torch.diag(1 / tau[:width])  # T⁻¹ of the compact WY form
        scaled = torch.linalg.solve_triangular(inverse, vectors, upper=True, left=False)
        rest = matrix[k + band :, k + band :]
        image = rest @ scaled
        image -= 0.5 * vectors @ (scaled.mT @ image)
        rest.sub_(image @ vectors.mT).sub_(vectors @ image.mT)
        panel.copy_(torch.triu(reflected))
        matrix[k : k + band, k + band :] = panel.mT
    banded = torch.zeros(side, band + 1, dtype=gram.dtype, device=gram.device)
    for i in range(band + 1):
        banded[: side - i, i] = torch.diagonal(matrix, -i)
    return banded


def band_eigenvalues(banded: np.ndarray) -> np.ndarray:
    """Eigenvalues of a banded matrix on the host: LAPACK's second stage, then QR of the tridiagonal."""
    library = find_openblas()
    side, band = banded.shape[0], banded.shape[1] - 1
    diagonal, off, house, size = np.zeros(side), np.zeros(side), np.zeros(1), np.zeros(1)
    second = (b"N", b"N", b"L", side, band, banded, band + 1, diagonal, off)
    library._call("dsytrd_sb2st", *second, house, -1, size, -1)
    lengths = int(house[0]), int(size[0])
    library._call("dsytrd_sb2st", *second, np.zeros(lengths[0]), lengths[0], np.zeros(lengths[1]), lengths[1])
    library._call("dsterf", side, diagonal, off)
    return diagonal


def host_eigenvalues(gram: np.ndarray) -> np.ndarray:
    """All eigenvalues on the host in two stages."""
    return find_openblas().eigenvalues_in_place(gram.copy())
