"""Many Gram matrices, and eigenvalues in two stages shared by the card and the host."""

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from gpu import candidates
from gpu.timing import Bench, Work
from threadpoolctl import threadpool_limits
from torch import Tensor

ONCE = Work(warm=False)


def batch(bench: Bench) -> None:
    """Time one size batched, in a loop, on several streams and on the host's cores; and small ones batched."""
    side, count = bench.sides[1], 4 if bench.smoke else 16
    stack = torch.stack([bench.delta("ft", 7 * bench.sides[0], side, seed) for seed in range(count)])
    case = f"{count} × {stack.shape[1]}×{side} Gram fp64"
    bench.measure(f"{case}, batched", lambda: torch.bmm(stack.double().mT, stack.double()))
    bench.measure(f"{case} lower, one by one", lambda: list(map(candidates.gram_lower, stack)))
    grams = torch.stack([matrix.mT @ matrix for matrix in stack.double()])
    case = f"{count} × {side}² eigvalsh fp64"
    bench.measure(f"{case}, batched", partial(torch.linalg.eigvalsh, grams))
    bench.measure(f"{case}, one by one", lambda: list(map(torch.linalg.eigvalsh, grams)))
    for width in () if bench.smoke else (2, 4, 8):
        bench.measure(f"{case}, {width} threads, a stream each", partial(_on_streams, grams, width))
    host = list(grams.cpu().numpy())
    way = partial(_on_all_cores, candidates.host_eigenvalues, host)
    bench.measure(f"{case}, two stages on the host, a core each", way, of=ONCE)
    for small in (16, 32) if bench.smoke else (64, 256, 512):
        factor = torch.randn(64, small, small, device=bench.device, dtype=torch.float64)
        bench.measure(f"64 × {small}² eigvalsh fp64, batched", partial(torch.linalg.eigvalsh, factor @ factor.mT))


def _on_streams(grams: Tensor, width: int) -> None:
    streams = [torch.cuda.Stream() for _ in range(width)]

    def work(i: int) -> Tensor:
        with torch.cuda.stream(streams[i % width]):
            return torch.linalg.eigvalsh(grams[i])

    with ThreadPoolExecutor(width) as pool:
        list(pool.map(work, range(len(grams))))


def _on_all_cores(function: Callable[[np.ndarray], np.ndarray], items: Iterable[np.ndarray]) -> None:
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        list(pool.map(function, items))


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def two_stage(bench: Bench) -> None:
    """Time the way to a band on the card and on from there on the host, and both on the host."""
    with threadpool_limits(1):
        for side in bench.sides[1:]:
            matrix = bench.delta("ft", side, side).double()
            _two_stage_of(bench, matrix.mT @ matrix)


def _two_stage_of(bench: Bench, gram: Tensor) -> None:
    side, exact = len(gram), torch.linalg.eigvalsh(gram).cpu()

    def judge(found: np.ndarray) -> str:
        return f"of λ₁ {float((torch.from_numpy(found) - exact).abs().max() / exact[-1]):.1e}"

    for band in (8,) if bench.smoke else (32, 64):
        work = Work(operations=4 / 3 * side**3)
        bench.measure(f"{side}² to band {band} on the card", partial(candidates.to_band, gram, band), of=work)
        banded = candidates.to_band(gram, band).cpu().numpy()
        way = partial(candidates.band_eigenvalues, banded)
        bench.measure(f"{side}² from band {band} on the host, one core", way, of=ONCE, judge=judge)
    host = gram.cpu().numpy()
    bench.measure(f"{side}² both on the host, one core", lambda: candidates.host_eigenvalues(host), of=ONCE)
    way = partial(_on_all_cores, candidates.host_eigenvalues, [host] * cores())
    case = f"{side}² both on the host, {cores()} matrices on as many cores, each"
    bench.measure(case, way, of=Work(items=cores(), warm=False))


def pipeline(bench: Bench) -> None:
    """Time many matrices in flight: to a band on the card, eigenvalues on the host, a thread and a stream each."""
    side = bench.sides[2]
    matrices = [bench.delta("ft", side, side, seed).double() for seed in range(2)]
    grams = [matrix.mT @ matrix for matrix in matrices]
    band = 8 if bench.smoke else 32  # what the card does for wider ones costs the host more time
    for width in (2,) if bench.smoke else (1, 4, 16):
        way = partial(_in_flight, grams, band, width, on_card=not bench.smoke)
        work = Work(items=2 * width, warm=False)
        bench.measure(f"{side}² band {band}, {width} in flight, each", way, of=work)


def _in_flight(grams: list[Tensor], band: int, width: int, *, on_card: bool) -> None:
    streams = [torch.cuda.Stream() if on_card else None for _ in range(width)]

    def work(i: int) -> None:
        stream = streams[i % width]
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            banded = candidates.to_band(grams[i % len(grams)], band).cpu().numpy()
        candidates.band_eigenvalues(banded)

    with threadpool_limits(1), ThreadPoolExecutor(width) as pool:
        list(pool.map(work, range(2 * width)))
