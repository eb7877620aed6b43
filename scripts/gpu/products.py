"""The card's ceilings, Gram matrices, and the way to the card and back."""

from functools import partial

import torch
from gpu import candidates
from gpu.timing import Bench, Work
from torch import Tensor


def peak(bench: Bench) -> None:
    """Time products in each arithmetic, and a copy."""
    side = 512 if bench.smoke else 8192
    work = Work(operations=2 * side**3)
    for dtype, tf32 in ((torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x = torch.randn(side, side, device=bench.device).to(dtype)
        name = "TF32" if tf32 else str(dtype).removeprefix("torch.")
        bench.measure(f"product {side}² {name}", partial(torch.mm, x, x), of=work)
    torch.backends.cuda.matmul.allow_tf32 = False
    if not bench.smoke:
        x = torch.randint(-64, 64, (side, side), device=bench.device, dtype=torch.int8)
        bench.measure(f"product {side}² int8", lambda: torch._int_mm(x, x.mT), of=work)
    source = torch.empty((1 << 22) if bench.smoke else (1 << 30), dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    bench.measure("copy on the card, read and written", lambda: target.copy_(source), of=Work(nbytes=2 * source.nbytes))


def gram(bench: Bench) -> None:
    """Time Gram matrices: float64 whole and by halves, float32, int8 slices."""
    small, medium, large = bench.sides
    for rows, side in ((large, large), (large * 43 // 16, large), (7 * small, medium), (8 * large, large)):
        _gram_of(bench, bench.delta("ft", rows, side))


def _gram_of(bench: Bench, matrix: Tensor) -> None:
    wide = matrix.double()
    exact = torch.tril(wide.mT @ wide)
    ways = {
        "fp64 product, cast included": lambda: matrix.double().mT @ matrix.double(),
        "fp64 product": lambda: wide.mT @ wide,
        "fp64 lower blocks of 512": partial(candidates.gram_lower, matrix, 512),
        "fp64 lower blocks of 1024": partial(candidates.gram_lower, matrix),
        "fp64 lower blocks of 1024, 2048 rows a time": partial(candidates.gram_lower, matrix, 1024, 2048),
        "fp32 product": lambda: matrix.mT @ matrix,
        "fp32 over 256 rows, fp64 sum": partial(candidates.gram_fp32, matrix),
        "int8, 2 slices": partial(candidates.gram_int8, matrix, 2),
        "int8, 3 slices": partial(candidates.gram_int8, matrix, 3),
        "int8, 4 slices": partial(candidates.gram_int8, matrix, 4),
    }
    rows, side = matrix.shape
    for name, way in ways.items():

        def judge(found: Tensor, way: object = way) -> str:
            error = float((torch.tril(found) - exact).abs().max() / exact.abs().max())
            return f"of max|G| {error:.1e}; {bench.peak(way)}"

        bench.measure(f"{rows}×{side} {name}", way, of=Work(operations=2 * side**2 * rows), judge=judge)


def emulation(bench: Bench) -> None:
    """Time float64 under cuBLAS's emulation of it, which this process's environment asks for."""
    large = bench.sides[2]
    for rows in (large, large * 43 // 16):
        matrix = bench.delta("ft", rows, large).double()
        work = Work(operations=2 * large**2 * rows)
        bench.measure(f"{rows}×{large} fp64 product", partial(torch.mm, matrix.mT, matrix), of=work)
        bench.measure(f"{large}² eigvalsh fp64", partial(torch.linalg.eigvalsh, matrix.mT @ matrix))


def transfer(bench: Bench) -> None:
    """Time the way to the card and back."""
    side = bench.sides[2]
    host = torch.randn(side, side).to(torch.bfloat16)
    to_card = Work(nbytes=host.nbytes)
    bench.measure(f"{side}² bf16 to the card", lambda: host.to(bench.device, copy=True), of=to_card)
    if not bench.smoke:
        pinned = host.pin_memory()
        bench.measure(f"{side}² bf16 to the card, pinned", lambda: pinned.to(bench.device), of=to_card)
        bench.measure(f"{side}² bf16 pinned", host.pin_memory, of=to_card)
    first, second = host.to(bench.device), host.clone().to(bench.device)
    bench.measure(f"{side}² difference of bf16 in fp32", lambda: first.float().sub_(second))
    bench.measure(f"{side}² difference of bf16 in fp64", lambda: first.double().sub_(second))
    gram = torch.randn(side, side, dtype=torch.float64, device=bench.device)
    bench.measure(f"{side}² fp64 to the host", lambda: gram.to("cpu", copy=True), of=Work(nbytes=gram.nbytes))
