"""What ROUTES rests on, and the cost of each room: pytest-benchmark, not collected by the test command.

    .venv-test/bin/pip install pytest-benchmark
    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 .venv-test/bin/python -m pytest tests/bench/bench_rooms.py

Groups print side by side with ratios to the fastest; DELTASPEC_BENCH_DEVICE=cuda measures a GPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltaspec.delta import DenseDelta
from deltaspec.linalg.gram import accumulate_gram
from deltaspec.linalg.openblas import find_openblas
from deltaspec.linalg.streamed import Streamed
from deltaspec.linalg.svd import decompose
from deltaspec.linalg.truncated import truncate, truncate_product
from deltaspec.store.run import Run
from deltaspec.types import MatrixSource, TensorSpec, View
from tests.store.test_run import MANIFEST, record

DEVICE = torch.device(os.environ.get("DELTASPEC_BENCH_DEVICE", "cpu"))
SIDES = [384, 1024, 1536, 2048]
EIGENSOLVERS = {
    "numpy": lambda gram: np.linalg.eigvalsh(gram.numpy(), UPLO="U"),
    "torch": lambda gram: torch.linalg.eigvalsh(gram, UPLO="U"),
    "two-stage": lambda gram: find_openblas().eigenvalues_in_place(gram.numpy().copy()),
}


def matrix(d_out, d_in):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("solver", EIGENSOLVERS)
@pytest.mark.parametrize("side", SIDES)
def test_eigenvalues(benchmark, side, solver):
    if DEVICE.type != "cpu" and solver != "torch":
        pytest.skip("a CPU library")
    benchmark.group = f"eigenvalues {side}²"
    dense = matrix(side, side)
    gram = dense @ dense.mT
    benchmark.pedantic(EIGENSOLVERS[solver], (gram,), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("shape", [(1024, 1024), (2816, 1024), (1024, 2816), (2048, 2048)])
@pytest.mark.parametrize("route", ["deltaspec", "deltaspec --exact", "svdvals fp32", "svdvals fp64"])
def test_all_values(benchmark, shape, route):
    benchmark.group = f"all values {shape[0]}×{shape[1]}"
    dense = matrix(*shape)

    def ours():
        return decompose(lambda: iter([dense]), shape, device=DEVICE, exact="exact" in route)

    def theirs():
        return torch.linalg.svdvals(dense.float() if route.endswith("32") else dense)

    benchmark.pedantic(ours if route.startswith("deltaspec") else theirs, rounds=2, warmup_rounds=1)


def finetune(d_out, d_in, noise):
    """A power law of rank 64 over dense noise of the share ``noise``, as full fine-tunes look, in float64."""
    powers = torch.arange(1, 65, dtype=torch.float64, device=DEVICE) ** -1
    signal = (matrix(d_out, 64) * powers) @ matrix(d_in, 64).mT
    rest = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    return signal / signal.norm() + noise * rest / rest.norm()


@pytest.mark.parametrize(("shape", "rank"), [((1024, 1024), 16), ((2816, 1024), 16), ((2048, 2048), 64)])
@pytest.mark.parametrize("noise", [0.4, 100.0])
@pytest.mark.parametrize("route", ["deltaspec", "deltaspec, all values", "svd fp32", "svd_lowrank fp32"])
def test_top(benchmark, shape, rank, noise, route):
    benchmark.group = f"top {rank} of {shape[0]}×{shape[1]}, noise {noise}"
    dense = finetune(*shape, noise)
    policies = {"deltaspec": rank, "deltaspec, all values": lambda values: rank}
    ways = {
        "svd fp32": lambda: torch.linalg.svd(dense.float(), full_matrices=False),
        "svd_lowrank fp32": lambda: torch.svd_lowrank(dense.float(), q=2 * rank, niter=4),
    }

    def ours():
        return truncate(Streamed(lambda: dense.split(512), shape, DEVICE), rank=policies[route])

    benchmark.pedantic(ours if route in policies else ways[route], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("rank", [16, 64, 256])
def test_top_of_factors(benchmark, rank):
    benchmark.group = "factors of 4096×11008"
    factors = matrix(4096, rank), matrix(rank, 11008)
    benchmark.pedantic(truncate_product, factors, {"rank": rank}, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("way", ["accumulate_gram", "torch.mm"])
@pytest.mark.parametrize("side", SIDES)
def test_gram(benchmark, side, way):
    benchmark.group = f"Gram {side}²"
    dense = matrix(side, side)
    if way == "torch.mm":
        benchmark.pedantic(lambda: dense.mT @ dense, rounds=3, warmup_rounds=1)
    else:
        benchmark.pedantic(lambda: accumulate_gram([dense], (side, side), device=DEVICE), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("rounding", ["first pass, counting roundings", "second pass"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_read_and_subtract(benchmark, tmp_path, dtype, rounding):
    benchmark.group = f"read and subtract 2816×1024 {dtype}"
    sources = []
    for side in range(2):
        file = tmp_path / f"{side}.safetensors"
        save_file({"w": (matrix(2816, 1024) + side).to(dtype).cpu()}, file)
        name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        sources.append(MatrixSource(TensorSpec("w", file, (2816, 1024), name), View((2816, 1024))))

    def setup():
        delta = DenseDelta(*sources, device=DEVICE)
        if rounding == "second pass":
            _ = delta.rounding
        return (delta,), {}

    benchmark.pedantic(lambda delta: [None for _ in delta.blocks()], setup=setup, rounds=5, warmup_rounds=1)


def test_write_a_record(benchmark, tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    put, spectrum = record("w")
    benchmark.group = "store"
    benchmark(run.put, put, spectrum)


def test_read_a_thousand_records(benchmark, tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    for i in range(1000):
        run.put(*record(f"layers.{i}.w", depth=i))
    benchmark.group = "store"
    benchmark.pedantic(lambda: Run.load(run.path).records, rounds=3)
