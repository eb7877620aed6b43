"""What a basis captures of a streamed matrix, in float64, and how far that is from the best of its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.linalg.krylov import promised_energy
from deltaspec.linalg.routes import EXACT
from deltaspec.linalg.signs import fix_signs
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.svd import EPS
from deltaspec.types import Spectrum, Truncation

CEILING = 1e-4  # no excess above this is returned
LIMIT = 2e-5  # of an estimated excess: estimates so small were never below half of the truth


@dataclass(frozen=True, slots=True)
class Subspace:
    """Where the top r singular vectors of the smaller side of D lie.

    ``rows`` (r, side), float64, of full rank: near the top right singular vectors of a tall D, left ones of a wide D.
    ``next_value`` is an estimate of the square of singular value r + 1.
    """

    rows: Tensor
    next_value: float


def certify(
    matrix: Streamed, found: Subspace, *, energy: float, method: str, spectrum: Spectrum | None = None
) -> Truncation | None:
    """Turn a basis of the smaller side into a truncation of D whose excess is known to be small.

    Parameters
    ----------
    matrix : Streamed
    found : Subspace
    energy : float
        ‖D‖²_F.
    method : str
        Name of the route, to be reported.
    spectrum : Spectrum, optional
        All singular values, where they are known.

    Returns
    -------
    Truncation or None
        None where the excess is above 1e-4, or its estimate above LIMIT.

    Notes
    -----
    left·Σ·rightᵀ is an orthogonal projection of D, so ‖D‖² - Σσ² is its residual whatever the basis. A second
    attempt starts from DᵀD·V, a power step in float64, which undoes the rounding of float32.
    """
    floor = (max(matrix.shape) * EPS) ** 2 * energy  # a residual this small is rounding
    basis, optimum = found.rows, _known_optimum(spectrum, len(found.rows))
    for _ in range(2):
        part = _project(matrix, basis)
        residual = energy - float(part.values.square().sum())
        if residual < 1e-7 * energy:  # the difference has lost its digits
            residual = _measure_residual(matrix, part.near)
        missed = promised_energy(part.values.square(), part.residuals, found.next_value)
        excess, limit = missed / max(residual, floor) / 2, LIMIT
        if optimum is not None:
            excess, limit = max(math.sqrt(residual / max(optimum, floor)) - 1, 0.0), CEILING
        if residual <= floor:
            excess = 0.0
        if excess <= limit:
            left, right = part.sides(matrix.shape)
            values = None if spectrum is None else spectrum.singular_values
            return Truncation(left, part.values.cpu(), right, matrix.shape, energy, residual, excess, method, values)
        basis = part.image
    return None


def _known_optimum(spectrum: Spectrum | None, rank: int) -> float | None:
    """Return Σσ² beyond ``rank``, what the best of that rank leaves; None where the values do not resolve it."""
    if spectrum is None:
        return None
    optimum = float(spectrum.singular_values[rank:].square().sum())
    return optimum if optimum > 1e5 * spectrum.error_bound**2 or spectrum.method == EXACT else None


@dataclass(frozen=True, slots=True)
class _Projection:
    """D restricted to a subspace of its smaller side: D·V = far·σ; all float64, ``near`` = Vᵀ as rows.

    ``residuals`` = ‖DᵀD·v - σ²v‖ of each vector; ``image`` = Vᵀ·DᵀD.
    """

    far: Tensor
    values: Tensor
    near: Tensor
    residuals: Tensor
    image: Tensor

    def sides(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Left and right vectors, on the CPU, with their signs fixed."""
        far, near = self.far, self.near.mT
        left, right = (far, near) if shape[0] >= shape[1] else (near, far)
        left, right = fix_signs(left.cpu(), right.cpu())
        return left.contiguous(), right.contiguous()


def _project(matrix: Streamed, basis: Tensor) -> _Projection:
    """Stream D once more, in float64, over the span of the rows of ``basis``."""
    near = torch.linalg.qr(basis.mT).Q.mT.contiguous()
    image, pieces = torch.zeros_like(near), []
    for block in matrix.tall():
        piece = near @ block.mT
        image.addmm_(piece, block)
        pieces.append(piece)
    orthogonal, triangle = torch.linalg.qr(torch.cat(pieces, dim=1).mT)
    turn, values, inner = torch.linalg.svd(triangle)
    near, image = inner @ near, inner @ image
    residuals = torch.linalg.vector_norm(image - values.square()[:, None] * near, dim=1)
    kept = values > max(matrix.shape) * EPS * values[0]
    return _Projection((orthogonal @ turn)[:, kept], values[kept], near[kept], residuals[kept], image)


def _measure_residual(matrix: Streamed, near: Tensor) -> float:
    """‖D - D·V·Vᵀ‖²_F from its elements."""
    return sum(float((block - (block @ near.mT) @ near).square().sum()) for block in matrix.tall())
