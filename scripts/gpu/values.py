"""All singular values: SVDs, and Gram matrices with eigensolvers of the card and of the host."""

from collections.abc import Callable
from functools import partial

import torch
from gpu import candidates
from gpu.timing import Bench, compare, to_values
from torch import Tensor


def values(bench: Bench) -> None:
    """Time every way to all singular values."""
    small, medium, large = bench.sides
    for rows, side in ((small, small), (medium, medium), (large, large), (large * 43 // 16, large)):
        matrix, exact = bench.delta("ft", rows, side), []
        for name, way in _ways(bench, matrix).items():

            def judge(found: Tensor, exact: list[Tensor] = exact, way: object = way) -> str:
                exact[:] = exact or [found]  # the first way is what the others are compared with
                return f"{compare(found, exact[0])}; {bench.peak(way)}"

            bench.measure(f"{rows}×{side} {name}", way, judge=judge)


def _ways(bench: Bench, matrix: Tensor) -> dict[str, Callable[[], Tensor]]:
    wide, linalg = matrix.double(), torch.linalg
    gram, gram32 = wide.mT @ wide, matrix.mT @ matrix
    drivers = {"default": {}} if bench.smoke else {"gesvd": {"driver": "gesvd"}, "gesvdj": {"driver": "gesvdj"}}
    svds = {f"svdvals fp64 {name}": partial(linalg.svdvals, wide, **given) for name, given in drivers.items()}
    svds |= {f"svdvals fp32 {name}": partial(linalg.svdvals, matrix, **given) for name, given in drivers.items()}
    if not bench.smoke:
        svds["svdvals fp32 gesvda"] = partial(linalg.svdvals, matrix, driver="gesvda")
    if matrix.shape[0] > matrix.shape[1]:
        svds = {}
    lower = partial(candidates.gram_lower, matrix)
    eigen = {
        "eigvalsh fp64 of its Gram matrix": lambda: to_values(linalg.eigvalsh(gram)),
        "eigvalsh fp32 of its fp32 Gram matrix": lambda: to_values(linalg.eigvalsh(gram32)),
        "Gram fp64 lower + eigvalsh fp64": lambda: to_values(linalg.eigvalsh(lower())),
        "Gram int8 3 slices + eigvalsh fp64": lambda: to_values(linalg.eigvalsh(candidates.gram_int8(matrix, 3))),
        "Gram int8 4 slices + eigvalsh fp64": lambda: to_values(linalg.eigvalsh(candidates.gram_int8(matrix, 4))),
        "Gram fp32, fp64 sum + eigvalsh fp64": lambda: to_values(linalg.eigvalsh(candidates.gram_fp32(matrix))),
        "Gram fp64 lower, eigvalsh on the host": lambda: to_values(linalg.eigvalsh(lower().cpu())),
    }
    return svds | eigen


def whole_svd(bench: Bench) -> None:
    """Time complete SVDs by torch's drivers."""
    if bench.smoke:
        return
    for side in bench.sides:
        svd = partial(torch.linalg.svd, bench.delta("ft", side, side), full_matrices=False)
        for driver in ("gesvdj", "gesvd"):
            bench.measure(f"{side}² svd fp32 {driver}", partial(svd, driver=driver))
