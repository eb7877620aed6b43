"""Routines of cuSOLVER that torch does not offer, called through ctypes."""

import ctypes
from functools import partial
from pathlib import Path

import torch
from gpu.timing import Bench, compare, to_values
from torch import Tensor

DOUBLE, SINGLE = 1, 0  # cudaDataType
INT, LONG = ctypes.c_int, ctypes.c_int64


class CuSolver:
    """Calls of the cuSOLVER that torch loaded which torch itself does not make."""

    def __init__(self) -> None:
        torch.linalg.eigvalsh(torch.eye(8, device="cuda"))  # loads the library
        lines = Path("/proc/self/maps").read_text().splitlines()
        path = next((line.split()[-1] for line in lines if "libcusolver.so" in line), "libcusolver.so.12")
        self.library, self.handle, self.parameters = ctypes.CDLL(path), ctypes.c_void_p(), ctypes.c_void_p()
        version = ctypes.c_int()
        for status in (
            self.library.cusolverDnCreate(ctypes.byref(self.handle)),
            self.library.cusolverDnCreateParams(ctypes.byref(self.parameters)),
            self.library.cusolverGetVersion(ctypes.byref(version)),
        ):
            if status:
                raise RuntimeError(f"cuSOLVER did not start: status {status}")
        self.version = version.value
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.library.cusolverDnSetStream(self.handle, stream)
        self.info = torch.zeros(64, dtype=torch.int32, device="cuda")

    def call(self, name: str, *given: object, after: tuple[object, ...] = (), batch: tuple[object, ...] = ()) -> None:
        """Ask for the workspace of a routine, then call it; ``batch`` ends both argument lists."""
        on_card, on_host = ctypes.c_size_t(), ctypes.c_size_t()
        first = (self.handle, self.parameters, *given)
        sizes = (ctypes.byref(on_card), ctypes.byref(on_host))
        status = getattr(self.library, f"{name}_bufferSize")(*first, *sizes, *batch)
        if status:
            raise RuntimeError(f"{name}_bufferSize: status {status}")
        room = torch.empty(max(on_card.value, 8), dtype=torch.uint8, device="cuda")
        host = ctypes.create_string_buffer(max(on_host.value, 8))
        end = (at(self.info), *after, *batch)
        status = getattr(self.library, name)(*first, at(room), on_card, host, on_host, *end)
        if status:
            raise RuntimeError(f"{name}: status {status}")

    def eigenvalues(self, name: str, gram: Tensor) -> Tensor:
        """All eigenvalues, ascending, by cusolverDnXsyevd or cusolverDnXsyevBatched."""
        side, kind = LONG(len(gram)), code(gram)
        matrix, values = gram.clone(), torch.empty_like(gram[0])
        batch = (LONG(1),) if name.endswith("Batched") else ()
        self.call(name, INT(0), INT(0), side, kind, at(matrix), side, kind, at(values), kind, batch=batch)
        return values

    def top_eigenvectors(self, gram: Tensor, count: int) -> Tensor:
        """Compute the top eigenvalues, with vectors, by cusolverDnXsyevdx."""
        side, kind, found = LONG(len(gram)), code(gram), LONG()
        matrix, values, unused = gram.clone(), torch.empty_like(gram[0]), ctypes.c_double()
        span = (ctypes.byref(unused), ctypes.byref(unused), LONG(len(gram) - count + 1), side, ctypes.byref(found))
        first = (INT(1), INT(1002), INT(0), side, kind, at(matrix), side)
        self.call("cusolverDnXsyevdx", *first, *span, kind, at(values), kind)
        return values[:count]

    def polar(self, square: Tensor, *, vectors: bool) -> tuple[Tensor, float]:
        """All singular values by the polar decomposition, cusolverDnXgesvdp, and the error that it reports."""
        side, kind, error = LONG(len(square)), code(square), ctypes.c_double()
        matrix, values = square.mT.clone(memory_format=torch.contiguous_format), torch.empty_like(square[0])
        left, right = torch.empty_like(matrix), torch.empty_like(matrix)
        sides = (kind, at(values), kind, at(left), side, kind, at(right), side, kind)
        first = (INT(vectors), INT(1), side, side, kind, at(matrix), side)
        self.call("cusolverDnXgesvdp", *first, *sides, after=(ctypes.byref(error),))
        return values, error.value

    def randomised(self, square: Tensor, count: int, extra: int, steps: int) -> Tensor:
        """Compute the top singular values, with vectors, by cusolverDnXgesvdr."""
        side, kind, job = LONG(len(square)), code(square), ctypes.c_byte(ord("S"))
        matrix, values = square.mT.clone(memory_format=torch.contiguous_format), torch.empty_like(square[0])
        left, right = torch.empty_like(matrix), torch.empty_like(matrix)
        first = (job, job, side, side, LONG(count), LONG(extra), LONG(steps), kind, at(matrix), side)
        sides = (kind, at(values), kind, at(left), side, kind, at(right), side, kind)
        self.call("cusolverDnXgesvdr", *first, *sides)
        return values[:count]


def at(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a tensor's first element."""
    return ctypes.c_void_p(tensor.data_ptr())


def code(tensor: Tensor) -> ctypes.c_int:
    """Return a tensor's cudaDataType."""
    return INT(DOUBLE if tensor.dtype == torch.float64 else SINGLE)


def cusolver(bench: Bench) -> None:
    """Time what torch does not offer."""
    if bench.smoke:
        return
    library = CuSolver()
    bench.row(f"cuSOLVER {library.version}")
    for side in bench.sides:
        matrix = bench.delta("ft", side, side)
        wide = matrix.double()
        gram = wide.mT @ wide
        exact = to_values(torch.linalg.eigvalsh(gram))
        for dtype in (torch.float64, torch.float32):
            name = f"{side}² {str(dtype).removeprefix('torch.')}"
            _measure(bench, library, name, gram.to(dtype), matrix.to(dtype), exact)


def _measure(bench: Bench, library: CuSolver, name: str, gram: Tensor, matrix: Tensor, exact: Tensor) -> None:
    def whole(found: Tensor) -> str:
        return compare(found, exact)

    def part(found: Tensor) -> str:
        best = float(exact[: len(found)].square().sum())
        return f"of the best Σσ² missed {1 - float(found.double().square().sum()) / best:.1e}"

    for routine in ("Xsyevd", "XsyevBatched"):
        way = partial(library.eigenvalues, f"cusolverDn{routine}", gram)
        bench.measure(f"{name} {routine} values", lambda way=way: to_values(way()), judge=whole)
    for count in (64, 256):
        bench.measure(f"{name} Xsyevdx top {count}", partial(library.top_eigenvectors, gram, count))
    for vectors in (False, True):
        case = f"{name} Xgesvdp (polar) {'with vectors' if vectors else 'values'}"
        bench.measure(case, partial(library.polar, matrix, vectors=vectors), judge=lambda found: whole(found[0]))
    for count, extra in ((64, 32), (256, 64)):
        case = f"{name} Xgesvdr top {count}, {extra} more, 4 steps"
        bench.measure(case, partial(library.randomised, matrix, count, extra, 4), judge=part)
