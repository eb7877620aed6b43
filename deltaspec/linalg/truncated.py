"""The top r singular triplets of a matrix that arrives in blocks, certified in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.linalg.certificate import Subspace, certify
from deltaspec.linalg.krylov import top_subspace
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.routes import choose_route
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.svd import EPS, exact_spectrum, gram_spectrum
from deltaspec.types import Spectrum, Truncation

Rank = int | Callable[[Tensor], int]
CRAMPED = 256  # sides below which a Gram matrix costs no more than an iteration
FEW = {"cpu": 16, "cuda": 64}  # ranks up to side over this are iterated for
# Milliseconds on an H200 (figures/bench_gpu.csv): the reduction 15 at 1024², 32 at 2048², 119 at 4096², whatever the
# rank; the iteration, from easy spectra to flat ones, 7 to 39 at 1024², r = 16; 27 to 48 at 2048², r = 32, and 44 to 63
# at r = 64; 36 to 107 at 4096², r = 64, and 131 to 147 at r = 256.
LARGE = 2048  # sides above which values alone and then an iteration cost less than one reduction for both


def truncate(matrix: Streamed, *, rank: Rank, seed: int = 0, memory: int | None = None) -> Truncation:
    """Compute the top r singular triplets of D: the best rank-r approximation, up to an excess that is reported.

    Parameters
    ----------
    matrix : Streamed
        D.
    rank : int or callable
        r, clamped to 0…min(shape); or a policy: all singular values, float64, descending → r.
    seed : int
        Of the iteration's start.
    memory : int, optional
        Bytes that D may take, whole in float32; where it takes more it is only streamed.

    Returns
    -------
    Truncation
        With fewer than r triplets where the rest is zero to rounding. ``excess`` ≤ 1e-4: exact where all values are
        known, else an estimate from ‖DᵀD·v - σ²v‖ measured in float64; 0 where the residual itself is rounding.

    Raises
    ------
    NumericalError
        If D holds NaN or infinity, or nothing converges.
    """
    shape, side = matrix.shape, min(matrix.shape)
    if side == 0 or (not callable(rank) and rank <= 0):
        return _nothing(shape, _finite(sum(float(block.square().sum()) for block in matrix.blocks())))
    fits = memory is None or 4 * shape[0] * shape[1] <= memory
    with _without_tf32(matrix.device):
        found = _try_iteration(matrix, rank, seed=seed) if fits and side >= CRAMPED else None
        return found or _by_reduction(matrix, rank) or _by_svd(matrix, rank)


def truncate_product(lora_B: Tensor, lora_A: Tensor, *, rank: Rank) -> Truncation:
    """Compute the top r singular triplets of B·A through two QRs, without forming it.

    Parameters
    ----------
    lora_B : Tensor, (d_out, k), float64
    lora_A : Tensor, (k, d_in), float64
    rank : int or callable
        As of ``truncate``.

    Returns
    -------
    Truncation
        With ``values``: those beyond min(k, d_out, d_in) are zero and left out.

    Raises
    ------
    NumericalError
        If a factor holds NaN or infinity.
    """
    shape = (lora_B.shape[0], lora_A.shape[1])
    scale = _finite(float(lora_A.norm() * lora_B.norm()))
    left, values, right = (part.cpu() for part in svd_of_product(lora_B, lora_A))
    if not values.numel() or float(values[0]) <= sum(shape) * EPS * scale:  # factors that cancel
        return _nothing(shape, 0.0, torch.zeros_like(values))
    spectrum = Spectrum(values, shape, float(values.square().sum()), "qr-of-factors", max(shape) * EPS * scale)
    rank = min(_resolve(rank, spectrum), int((values > spectrum.error_bound).sum()))
    parts = left[:, :rank].contiguous(), values[:rank], right[:, :rank].contiguous()
    return Truncation(*parts, shape, spectrum.energy, float(values[rank:].square().sum()), 0.0, spectrum.method, values)


def _try_iteration(matrix: Streamed, rank: Rank, *, seed: int) -> Truncation | None:
    """Iterate where the rank is small beside the side; a policy's rank is known from the values, first on the CPU."""
    side, spectrum = min(matrix.shape), None
    fixed = None if callable(rank) else min(rank, side)
    if fixed is None and side > LARGE and matrix.device.type == "cpu":
        method = choose_route(matrix.device, "values", side)
        spectrum = gram_spectrum(matrix.blocks, matrix.shape, device=matrix.device, method=method)[0]
        fixed = _resolve(rank, spectrum) if spectrum else None
    if not fixed or FEW[matrix.device.type] * fixed > side:
        return None
    return _by_iteration(matrix, fixed, seed=seed, spectrum=spectrum)


def _by_iteration(matrix: Streamed, rank: int, *, seed: int, spectrum: Spectrum | None) -> Truncation | None:
    """Iterate on D whole in float32; None where the result cannot be certified."""
    axis, energy, start = (0 if matrix.shape[0] >= matrix.shape[1] else 1), 0.0, 0
    held = matrix.hold() if matrix.hold else None
    whole = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.device) if held is None else held
    for block in matrix.blocks():
        flat = block.reshape(-1)
        energy += float(torch.dot(flat, flat))
        if held is None:
            whole.narrow(axis, start, block.shape[axis]).copy_(block)
        start += block.shape[axis]
    if _finite(energy) == 0.0:
        return _nothing(matrix.shape, 0.0)
    found = top_subspace(whole if axis == 0 else whole.mT, rank, energy=energy, seed=seed)
    del whole, held
    if found is None:
        return None
    basis, next_value = found
    method = choose_route(matrix.device, "top", min(matrix.shape))
    method = f"{spectrum.method}+{method}" if spectrum else method
    return certify(matrix, Subspace(basis, next_value), energy=energy, method=method, spectrum=spectrum)


def _by_reduction(matrix: Streamed, rank: Rank) -> Truncation | None:
    """Get all values and the top vectors from the Gram matrix; None where a certificate is missed or a value drowns."""
    method = choose_route(matrix.device, "vectors", min(matrix.shape))
    spectrum, basis = gram_spectrum(matrix.blocks, matrix.shape, device=matrix.device, method=method)
    if spectrum is None:
        return None
    values = spectrum.singular_values
    rank = _resolve(rank, spectrum) if spectrum.energy else 0
    if rank == 0 or basis is None:
        return _nothing(matrix.shape, spectrum.energy, values)
    if values[rank - 1] <= spectrum.error_bound:
        return None
    try:
        vectors = basis(rank)
    except np.linalg.LinAlgError:
        return None
    following, energy = _next(values, rank), spectrum.energy
    return certify(matrix, Subspace(vectors, following), energy=energy, method=method, spectrum=spectrum)


def _by_svd(matrix: Streamed, rank: Rank) -> Truncation:
    """Take the last resort, right to eps·σ₁ for every value."""
    spectrum, basis = exact_spectrum(matrix.blocks, matrix.shape, device=matrix.device, vectors=True)
    values = spectrum.singular_values
    rank = min(_resolve(rank, spectrum), int((values > spectrum.error_bound).sum())) if spectrum.energy else 0
    if rank == 0 or basis is None:
        return _nothing(matrix.shape, spectrum.energy, values)
    following, energy, method = _next(values, rank), spectrum.energy, spectrum.method
    found = certify(matrix, Subspace(basis(rank), following), energy=energy, method=method, spectrum=spectrum)
    if found is None:
        message = "its SVD is no best approximation of its rank."
        raise NumericalError(message)
    return found


def _next(values: Tensor, rank: int) -> float:
    return float(values[rank]) ** 2 if rank < len(values) else 0.0


def _resolve(rank: Rank, spectrum: Spectrum) -> int:
    """Return the rank that a number or a policy means, within 0…min(shape)."""
    values = spectrum.singular_values
    return max(0, min(rank(values) if callable(rank) else rank, len(values)))


def _finite(energy: float) -> float:
    if not math.isfinite(energy):
        message = "it holds NaN or infinity."
        raise NumericalError(message)
    return energy


def _nothing(shape: tuple[int, int], energy: float, values: Tensor | None = None) -> Truncation:
    """Rank 0: of a zero matrix, or because that was asked for."""
    left, right = (torch.zeros(n, 0, dtype=torch.float64) for n in shape)
    method = "none" if energy else "zero"
    return Truncation(left, torch.zeros(0, dtype=torch.float64), right, shape, energy, energy, 0.0, method, values)


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Switch TensorFloat-32 products off where a program has switched them on."""
    products = torch.backends.cuda.matmul
    if device.type != "cuda" or products.fp32_precision != "tf32":
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = "tf32"
