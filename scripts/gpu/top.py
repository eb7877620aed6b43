"""The top r singular vectors by iterations of several kinds, and deltaspec's own routes."""

from collections.abc import Callable
from functools import partial

import torch
from gpu import candidates
from gpu.timing import Bench, Work
from threadpoolctl import threadpool_limits
from torch import Tensor

from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.svd import decompose
from deltaspec.linalg.truncated import _by_iteration, _by_reduction
from deltaspec.types import Truncation


def top(bench: Bench) -> None:
    """Time ways to the top r right singular vectors."""
    large = bench.sides[2]
    for kind in ("ft", "lora", "flat"):
        matrix = bench.delta(kind, large, large)
        wide = matrix.double()
        gram = wide.mT @ wide
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        for rank in (8, 16) if bench.smoke else (16, 64, 256):
            judge = partial(_excess, gram=gram, tail=float(gram.diagonal().sum() - eigenvalues[:rank].sum()))
            for name, way in _ways(matrix, gram, rank).items():
                bench.measure(f"{kind} {large}² r = {rank} {name}", way, judge=judge)
        bench.measure(f"{kind} {large}² eigh fp64 of the Gram matrix", partial(torch.linalg.eigh, gram))


def _excess(found: Tensor, *, gram: Tensor, tail: float) -> str:
    basis = torch.linalg.qr(found.double())[0]
    missed = float(gram.diagonal().sum() - (basis * (gram @ basis)).sum())
    return f"excess {(max(missed, 0.0) / tail) ** 0.5 - 1:.1e}"


def _ways(matrix: Tensor, gram: Tensor, rank: int) -> dict[str, Callable[[], Tensor]]:
    def start(width: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator(device=matrix.device).manual_seed(0)
        return torch.randn(len(gram), width, generator=generator, device=matrix.device, dtype=dtype)

    def on_matrix(width: int, steps: int, orthonormalise: Callable[[Tensor], Tensor]) -> Tensor:
        first = start(width, torch.float32)
        basis = candidates.block_krylov(lambda q: matrix.mT @ (matrix @ q), first, steps, orthonormalise)
        basis = candidates.orthonormal(basis) if orthonormalise is candidates.orthonormal32 else basis
        image = matrix @ basis
        turn = torch.linalg.eigh((image.mT @ image).double())[1]
        return basis @ turn.flip(1)[:, :rank].to(basis.dtype)

    def on_gram(width: int, steps: int) -> Tensor:
        basis = candidates.block_krylov(lambda q: gram @ q, start(width, gram.dtype), steps, candidates.orthonormal)
        return basis @ torch.linalg.eigh(basis.mT @ (gram @ basis))[1].flip(1)[:, :rank]

    half, exact = rank // 2 + 4, candidates.orthonormal
    return {
        "svd_lowrank, 2 steps": lambda: torch.svd_lowrank(matrix, q=rank + 10, niter=2)[2][:, :rank],
        "svd_lowrank, 4 steps": lambda: torch.svd_lowrank(matrix, q=rank + 10, niter=4)[2][:, :rank],
        "block Krylov, 4 steps of r + 4": partial(on_matrix, rank + 4, 4, exact),
        "block Krylov, 8 steps of r/2 + 4": partial(on_matrix, half, 8, exact),
        "block Krylov, 12 steps of r/2 + 4": partial(on_matrix, half, 12, exact),
        "block Krylov, 8 steps of r/2 + 4, fp32 Cholesky": partial(on_matrix, half, 8, candidates.orthonormal32),
        "block Krylov on the fp64 Gram matrix, 12 steps": partial(on_gram, half, 12),
    }


def deltaspec(bench: Bench) -> None:
    """Time deltaspec's routes from float64 blocks on the device, with one BLAS thread, as its engine sets it."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for side in bench.sides:
            for kind in ("ft", "lora", "flat"):
                _own_routes(bench, f"{kind} {side}²", bench.delta(kind, side, side).double())


def _own_routes(bench: Bench, name: str, matrix: Tensor) -> None:
    device, side = matrix.device, len(matrix)

    def blocks() -> list[Tensor]:
        return list(matrix.split(1024))

    def judge(found: Truncation | None) -> str:
        return "refused" if found is None else f"excess {found.excess:.1e}"

    if name.startswith("ft"):
        run = partial(decompose, blocks, (side, side), device=device)
        bench.measure(f"{name} values", run)
        bench.measure(f"{name} values, 64 vectors", partial(run, vectors=64))
        bench.measure(f"{name} exact values", partial(run, exact=True), of=Work(warm=False))
    streamed = Streamed(blocks, (side, side), device)
    for rank in (r for r in (4, 16, 32, 64, 128, 256) if 16 * r <= side):
        iterate = partial(_by_iteration, streamed, rank, seed=0, spectrum=None)
        bench.measure(f"{name} r = {rank} by iteration", iterate, judge=judge)
        bench.measure(f"{name} r = {rank} by reduction", partial(_by_reduction, streamed, rank), judge=judge)
