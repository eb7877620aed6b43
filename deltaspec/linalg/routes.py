"""ROUTES: which decomposition serves when, with the measurement behind each line."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deltaspec.linalg.openblas import find_openblas

TWO_STAGE, ONE_STAGE = "gram64+twostage", "gram64+onestage"
KRYLOV, EXACT = "krylov32", "qr+svd64"


@dataclass(frozen=True, slots=True)
class Route:
    """One line of ROUTES: for sides up to ``max_side`` on ``device``, ``need`` is served by ``method``."""

    device: str
    need: str
    max_side: float
    method: str
    evidence: str


ROUTES = (
    Route("cpu", "values", 1792, "gram64+numpy", "1024²: .11 CPU s, two-stage .12, torch .15; svdvals32 .40"),
    Route("cpu", "values", math.inf, TWO_STAGE, "4096²: eigenvalues 4.8 CPU s, torch 7.0, numpy 8.4; svdvals32 20.8"),
    Route(
        "cpu", "values", math.inf, "gram64+torch", "2048²: .69 against numpy .77; 4096²: 5.4 against 7.7; svdvals 19.6"
    ),
    Route("cpu", "vectors", math.inf, ONE_STAGE, "1024²: 64 vectors .20 CPU s, 256 .31, eigh .68; 2048²: 128 1.3, 4.3"),
    Route("cpu", "vectors", math.inf, "gram64+eigh", "without OpenBLAS; V only, U·Σ = ΔW·V streamed"),
    Route("cpu", "top", math.inf, KRYLOV, "1024², r = 16: .029 CPU s, svd32 .47; 4096², r = 64: 1.2, svd32 47"),
    Route("cpu", "exact", math.inf, EXACT, "below √(n·eps)·σ₁ a Gram matrix keeps no digit; QR and SVD keep eps·σ₁"),
    Route("cuda", "values", math.inf, "gram64+torch", "H200, 4096²: 104 ms; svdvals64 630; copied to the host 1480"),
    Route("cuda", "vectors", math.inf, "gram64+eigh", "H200, 4096²: 64 vectors and all values 116 ms; svd32 1050"),
    Route("cuda", "top", math.inf, KRYLOV, "H200, 4096², r = 64: 36 to 107 ms, from the Gram matrix 119; TF32 off"),
    Route("cuda", "exact", math.inf, EXACT, "H200, 4096²: gesvd 634 ms, gesvdj 1438 and beyond the error bound"),
)


def choose_route(device: torch.device, need: str, side: int) -> str:
    """Return the method that serves ``need`` where the smaller side is ``side``: the first line of ROUTES that fits.

    Parameters
    ----------
    device : torch.device
        Of which the type decides.
    need : str
        ``values`` (all σ), ``vectors`` (all σ and the top vectors), ``top`` (the top r alone) or ``exact``.
    side : int
        min(d_out, d_in).

    Examples
    --------
    >>> choose_route(torch.device("cpu"), "exact", 4096)
    'qr+svd64'
    """
    fitting = (r.method for r in ROUTES if r.device == device.type and r.need == need and side <= r.max_side)
    return next(method for method in fitting if method not in (ONE_STAGE, TWO_STAGE) or find_openblas())
