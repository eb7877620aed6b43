"""Singular values and vectors of a matrix that arrives in blocks, by the route that ROUTES names."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.linalg.gram import accumulate_gram, gram_energy
from deltaspec.linalg.openblas import find_openblas
from deltaspec.linalg.routes import EXACT, ONE_STAGE, TWO_STAGE, choose_route
from deltaspec.linalg.signs import fix_signs
from deltaspec.linalg.streamed import Blocks
from deltaspec.types import Spectrum

TopBasis = Callable[[int], Tensor]
EPS = float(torch.finfo(torch.float64).eps)
CERTIFICATE = 1e-10  # relative; ≤ 7e-16 observed, so a miss means a broken decomposition


def decompose(
    blocks: Blocks, shape: tuple[int, int], *, device: torch.device, vectors: int = 0, exact: bool = False
) -> tuple[Spectrum, str]:
    """Compute all singular values of D, and its top singular vectors where asked for.

    Parameters
    ----------
    blocks : callable
        Each call starts again over D in float64 blocks along its longer axis: rows of a tall D, columns of a wide one.
    shape : (d_out, d_in)
    device : torch.device
        Where blocks arrive and the work is done.
    vectors : int
        How many top triplets to keep; fewer where values drown in the error bound.
    exact : bool
        QR and SVD instead of the Gram matrix.

    Returns
    -------
    spectrum : Spectrum
    note : str
        Why the exact route was taken although it was not asked for; "" normally.

    Raises
    ------
    NumericalError
        If D holds NaN or infinity, or nothing converges.

    Notes
    -----
    Gram route: fl(DᵀD) is off by at most d·eps·‖D‖² in norm (d the longer side), and the symmetric eigensolver by
    side·eps·‖G‖, so σ² is off by at most δ = (d + side)·eps·‖D‖²_F, and σ by min(√δ, δ/σ). Certified on every matrix
    by Σσ² = ‖D‖²_F (summed from elements) and Σσ⁴ = ‖G‖²_F.
    """
    side = min(shape)
    if side == 0:
        return Spectrum(torch.zeros(0, dtype=torch.float64), shape, 0.0, "empty", 0.0), ""
    note, need = "", "exact" if exact else "vectors" if vectors else "values"
    if need != "exact":
        spectrum, basis = gram_spectrum(blocks, shape, device=device, method=choose_route(device, need, side))
        if spectrum is not None:
            return _with_vectors(spectrum, basis, blocks, vectors), ""
        note = "the Gram route missed its certificate; recomputed by QR and SVD"
    spectrum, basis = exact_spectrum(blocks, shape, device=device, vectors=vectors > 0)
    return _with_vectors(spectrum, basis, blocks, vectors), note


def gram_spectrum(
    blocks: Blocks, shape: tuple[int, int], *, device: torch.device, method: str
) -> tuple[Spectrum | None, TopBasis | None]:
    """Compute all σ of D from its smaller Gram matrix; None where a certificate is missed.

    Parameters
    ----------
    blocks, shape, device
        As in ``decompose``.
    method : str
        Of ROUTES, for the need "values" or "vectors".

    Returns
    -------
    spectrum : Spectrum or None
    basis : callable or None
        Of "vectors" methods: count → the top singular vectors of the smaller side as rows, (count, side), float64.

    Raises
    ------
    NumericalError
        If D holds NaN or infinity.
    """
    gram, energy = accumulate_gram(blocks(), shape, device=device)
    if not math.isfinite(energy):
        message = "it holds NaN or infinity."
        raise NumericalError(message)
    if energy == 0.0:
        return Spectrum(torch.zeros(min(shape), dtype=torch.float64), shape, 0.0, "zero", 0.0), None
    quartic = gram_energy(gram)
    if quartic == 0.0:  # underflow: weights below 1e-80
        return None, None
    try:
        eigenvalues, basis = _eigen(gram, method)
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return None, None
    eigenvalues = eigenvalues.flip(0)
    misses = abs(float(eigenvalues.sum()) / energy - 1), abs(float(eigenvalues.square().sum()) / quartic - 1)
    if not max(misses) <= CERTIFICATE:  # also catches NaN
        return None, None
    bound = math.sqrt((max(shape) + min(shape)) * EPS * energy)
    values = eigenvalues.clamp_min(0).sqrt().cpu()
    return Spectrum(values, shape, energy, method, bound), basis


def _eigen(gram: Tensor, method: str) -> tuple[Tensor, TopBasis | None]:
    """Eigenvalues, ascending, of a Gram matrix given by its upper triangle, which may be destroyed."""
    library = find_openblas()
    if method == "gram64+numpy":
        return torch.from_numpy(np.linalg.eigvalsh(gram.numpy(), UPLO="U")), None
    if method == "gram64+torch":
        return torch.linalg.eigvalsh(gram, UPLO="U"), None
    if method == TWO_STAGE and library:
        return torch.from_numpy(library.eigenvalues_in_place(gram.numpy())), None
    if method == ONE_STAGE and library:
        reduced = library.tridiagonal(gram.numpy())
        return torch.from_numpy(reduced.eigenvalues()), lambda count: torch.from_numpy(reduced.eigenvectors(count))
    eigenvalues, vectors = torch.linalg.eigh(gram, UPLO="U")
    return eigenvalues, lambda count: vectors.flip(1)[:, :count].mT.contiguous()


def exact_spectrum(
    blocks: Blocks, shape: tuple[int, int], *, device: torch.device, vectors: bool
) -> tuple[Spectrum, TopBasis | None]:
    """Compute all σ of D from the R of a QR that absorbs the blocks; each is right to a modest multiple of eps·σ₁.

    Parameters
    ----------
    blocks, shape, device
        As in ``decompose``.
    vectors : bool

    Returns
    -------
    spectrum : Spectrum
    basis : callable or None
        As of ``gram_spectrum``.

    Raises
    ------
    NumericalError
        If D holds NaN or infinity, or the SVD does not converge.
    """
    rest, energy = _absorb(blocks, shape, device)
    values, vt = _svd(rest, vectors=vectors)
    if not abs(float(values.square().sum()) - energy) <= CERTIFICATE * energy:
        message = "its SVD missed the certificate Σσ² = ‖·‖²."
        raise NumericalError(message)
    bound = max(shape) * EPS * float(values[0])
    return Spectrum(values.cpu(), shape, energy, EXACT, bound), (lambda count: vt[:count]) if vectors else None


def _absorb(blocks: Blocks, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, float]:
    """Reduce D, or Dᵀ where D is wide, to at most 1.2·side rows with the same σ; return them, and ‖D‖²_F."""
    side, tall, energy = min(shape), shape[0] >= shape[1], 0.0
    triangle = torch.zeros(0, side, dtype=torch.float64, device=device)
    pending: list[Tensor] = []
    for block in blocks():
        energy += float(block.square().sum())
        pending.append((block if tall else block.mT).clone())
        if sum(piece.shape[0] for piece in pending) >= 2 * side:
            triangle = torch.linalg.qr(torch.cat([triangle, *pending]), mode="r").R
            pending = []
    if not math.isfinite(energy):
        message = "it holds NaN or infinity."
        raise NumericalError(message)
    rest = torch.cat([triangle, *pending])
    del pending
    return (torch.linalg.qr(rest, mode="r").R if rest.shape[0] > 1.2 * side else rest), energy


def _svd(matrix: Tensor, *, vectors: bool) -> tuple[Tensor, Tensor]:
    """All singular values and, where asked for, right singular vectors as rows; each value is right to eps·σ₁."""
    # 4096² on an H200: gesvdj, CUDA's default, is off by 1.6e-12·σ₁, more than side·eps; gesvd keeps 2e-14·σ₁
    driver = "gesvd" if matrix.device.type == "cuda" else None
    try:
        if not vectors:
            return torch.linalg.svdvals(matrix, driver=driver), matrix
        _, values, vt = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    except torch.linalg.LinAlgError as cause:  # type: ignore[attr-defined]
        message = "its SVD did not converge."
        raise NumericalError(message) from cause
    return values, vt


def _with_vectors(spectrum: Spectrum, basis: TopBasis | None, blocks: Blocks, count: int) -> Spectrum:
    """Attach the top vectors: those of the smaller side from ``basis``, the others as D·v/σ in a second pass."""
    if basis is None or count == 0:
        return spectrum
    values = spectrum.singular_values
    kept = int((values[:count] > spectrum.error_bound).sum())
    near = basis(kept).mT
    tall = spectrum.shape[0] >= spectrum.shape[1]
    far = torch.cat([(block if tall else block.mT) @ near for block in blocks()]) / values[:kept].to(near.device)
    left, right = (far, near) if tall else (near, far)
    left, right = fix_signs(left.cpu(), right.cpu())
    return Spectrum(
        values,
        spectrum.shape,
        spectrum.energy,
        spectrum.method,
        spectrum.error_bound,
        left.contiguous(),
        right.contiguous(),
    )
