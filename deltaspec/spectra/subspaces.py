"""How a change lies to another change, and to the weights: subspaces, amplification, intruder dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NODES = 20_000  # midpoints of an integral over [0, √(2 ln q) + 9]; its error is below 1e-6


@dataclass(frozen=True, slots=True)
class Similarity:
    """Overlap φ of two subspaces, in 0…1, and what random ones of the same sizes score on average."""

    phi: float
    null: float

    @property
    def excess(self) -> float:
        """φ minus its null."""
        return self.phi - self.null


@dataclass(frozen=True, slots=True)
class Amplification:
    """How much a change amplifies directions that the weights have little of.

    ``projected`` = ‖UᵀWV‖ with the change's top singular vectors, ``factor`` = ‖ΔW‖ / ``projected`` (infinite where
    that is zero), ``null`` the root mean square of ``projected`` for random directions.
    """

    factor: float
    projected: float
    null: float


@dataclass(frozen=True, slots=True)
class Intruders:
    """Top singular vectors of the tuned weights that resemble none of the base's.

    ``cosines`` (k,) is each vector's largest |cos| with any of the base's, ``count`` how many are below the limit,
    ``energy_share`` their part of ‖W_tuned‖², and ``null`` the mean largest |cos| of a random vector. A count says that
    vectors are spread over many of the base's, not that they lie outside its span: random ones all count.
    """

    count: int
    energy_share: float
    cosines: Tensor
    null: float


def compare_subspaces(first: Tensor, second: Tensor) -> Similarity:
    """Compute φ = ‖V₁ᵀV₂‖² / min(k₁, k₂), whose mean for random subspaces of R^d is max(k₁, k₂)/d.

    Parameters
    ----------
    first : Tensor, (d, k₁), any float dtype
        Orthonormal columns: the top singular vectors of one change, right ones for its inputs, left for its outputs.
    second : Tensor, (d, k₂)

    Returns
    -------
    Similarity
        Of no subspace (k = 0) both are 0.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, section 7.2 and appendix G; φ = 1 - d²/min(k₁, k₂) with d the projection distance.
    """
    smaller, larger = sorted((first.shape[1], second.shape[1]))
    if smaller == 0:
        return Similarity(0.0, 0.0)
    overlap = first.double().mT @ second.double()
    return Similarity(float(overlap.square().sum()) / smaller, larger / first.shape[0])


def amplify(weight: Tensor, left: Tensor, right: Tensor, *, norm: float) -> Amplification:
    """Compute ‖ΔW‖ / ‖UᵀWV‖ for the top r singular vectors U, V of ΔW.

    Parameters
    ----------
    weight : Tensor, (d_out, d_in), any float dtype
        The base's.
    left : Tensor, (d_out, r)
    right : Tensor, (d_in, r)
    norm : float
        ‖ΔW‖.

    References
    ----------
    Hu et al., LoRA, ICLR 2022, section 7.3.
    """
    matrix = weight.double()
    projected = float(torch.linalg.matrix_norm(left.double().mT @ matrix @ right.double()))
    d_out, d_in = weight.shape
    null = null_projection(float(torch.linalg.matrix_norm(matrix)), left.shape[1], (d_out, d_in))
    return Amplification(norm / projected if projected else math.inf, projected, null)


def null_projection(norm: float, rank: int, shape: tuple[int, int]) -> float:
    """Return the root mean square of ‖UᵀWV‖ for random orthonormal U, V of ``rank`` columns: ‖W‖·r/√(d_out·d_in).

    Parameters
    ----------
    norm : float
        ‖W‖_F, in units of the weights.
    rank : int
    shape : (d_out, d_in)

    References
    ----------
    Hu et al., LoRA, arXiv:2106.09685, table 7: its random baselines are 0.02 and 0.33.

    Examples
    --------
    >>> round(null_projection(61.95, 4, (12288, 12288)), 4)
    0.0202
    """
    return norm * rank / math.sqrt(shape[0] * shape[1])


def find_intruders(left: Tensor, values: Tensor, base_left: Tensor, *, energy: float, limit: float = 0.5) -> Intruders:
    """Count the tuned weights' top left singular vectors whose |cos| with every one of the base's is below a limit.

    Parameters
    ----------
    left : Tensor, (d_out, k), any float dtype
        The top k of the tuned weights; the paper takes 10.
    values : Tensor, (k,) or more
        Their singular values.
    base_left : Tensor, (d_out, q)
        All of the base's.
    energy : float
        ‖W_tuned‖².
    limit : float

    References
    ----------
    Shuttleworth et al., LoRA vs full fine-tuning: an illusion of equivalence, arXiv:2410.21228, section 4.
    """
    cosines = (base_left.double().mT @ left.double()).abs().amax(0)
    found = cosines < limit
    share = float(values[: len(found)].double().square()[found.to(values.device)].sum()) / energy if energy else 0.0
    return Intruders(int(found.sum()), share, cosines, null_cosine(*base_left.shape))


def null_cosine(d: int, q: int | None = None) -> float:
    """Mean largest |cos| of a random unit vector of R^d with q orthonormal ones, by default a whole basis.

    A Gaussian vector's direction and length are independent, so this is E max|g_i| / E‖g‖, with
    E max = ∫ 1 - erf(x/√2)^q dx and E‖g‖ = √2·Γ((d+1)/2)/Γ(d/2).
    """
    count = d if q is None else q
    end = math.sqrt(2 * math.log(max(count, 2))) + 9
    x = (torch.arange(NODES, dtype=torch.float64) + 0.5) * (end / NODES)
    largest = float(-torch.expm1(count * torch.erf(x / math.sqrt(2)).log()).sum()) * end / NODES
    return largest / (math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2)))


def random_change(values: Tensor, shape: tuple[int, int], *, seed: int) -> tuple[Tensor, Tensor]:
    """Return factors (d_out, k) and (k, d_in), float64, of a change with these singular values in random directions.

    Parameters
    ----------
    values : Tensor, (k,)
    shape : (d_out, d_in)
        Both at least k.
    seed : int
    """
    generator = torch.Generator().manual_seed(seed)
    sides = (torch.randn(size, len(values), generator=generator, dtype=torch.float64) for size in shape)
    left, right = (q * r.diagonal().sign() for q, r in map(torch.linalg.qr, sides))  # undoes the signs that QR prefers
    return left * values.cpu().double(), right.mT
