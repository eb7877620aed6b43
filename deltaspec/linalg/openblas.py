"""Three things the OpenBLAS that NumPy loaded can do and NumPy does not offer, called through ctypes.

- G += X·Xᵀ in one triangle (syrk with β = 1): no temporary the size of G, and none of NumPy's mirroring;
- eigenvalues by two-stage tridiagonalisation, dense → band → tridiagonal: nearly all its work is matrix products, where
  the usual one-stage reduction does half of it in matrix-vector products at memory speed;
- all eigenvalues and only the top eigenvectors from one reduction, where NumPy's eigh computes every vector.

All are in LAPACK and CBLAS, but exposed by neither NumPy, SciPy nor torch. A library is used only after it has solved
a small problem right; without one the callers take NumPy and torch. Like all foreign calls these let go of the
interpreter, so matrices run side by side in threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

BAND = 64  # width of the intermediate band: 4096² takes 5.4 CPU s at 32, 4.9 at 48, 4.8 at 64, and a fifth more as "U"
ROW_MAJOR, UPPER, AS_IS, TRANSPOSED = 101, 121, 111, 112  # CBLAS
LAPACK = ("dsytrd_sy2sb", "dsytrd_sb2st", "dsterf", "dsytrd", "dstemr", "dormtr")
Matrix = NDArray[np.float64]
Argument = bytes | int | NDArray[Any]


class OpenBlas:
    """The routines of one loaded library, under whatever prefix and integer size it was built with."""

    def __init__(self, library: ctypes.CDLL) -> None:
        names = [(prefix, wide) for prefix in ("scipy_", "") for wide in ("64_", "")]
        prefix, wide = next((p, w) for p, w in names if hasattr(library, f"{p}cblas_dsyrk{w}"))
        self._integer: Any = ctypes.c_int64 if wide else ctypes.c_int32
        self._syrk = getattr(library, f"{prefix}cblas_dsyrk{wide}")
        self._lapack = {name: getattr(library, f"{prefix}{name}_{wide}") for name in LAPACK}

    def add_gram(self, gram: Matrix, block: Matrix, *, of_columns: bool) -> None:
        """Add XᵀX (``of_columns``) or X·Xᵀ to the upper triangle of ``gram``.

        Parameters
        ----------
        gram : (side, side) float64, C-contiguous
        block : (rows, side) or, where not ``of_columns``, (side, columns), float64, C-contiguous
        """
        side, inner = block.shape[::-1] if of_columns else block.shape
        shape = (TRANSPOSED if of_columns else AS_IS, self._integer(side), self._integer(inner))
        one, width = ctypes.c_double(1.0), self._integer(block.shape[1])
        order = (ctypes.c_int(ROW_MAJOR), ctypes.c_int(UPPER), ctypes.c_int(shape[0]))
        self._syrk(*order, *shape[1:], one, _at(block), width, one, _at(gram), self._integer(side))

    def eigenvalues_in_place(self, gram: Matrix) -> Matrix:
        """Compute all eigenvalues of a symmetric matrix, ascending, destroying it; only its upper triangle is read.

        Parameters
        ----------
        gram : (side, side) float64, C-contiguous

        Raises
        ------
        numpy.linalg.LinAlgError
            If LAPACK reports failure.

        References
        ----------
        Haidar, Ltaief & Dongarra, Parallel reduction to condensed forms for symmetric eigenvalue problems, SC 2011.
        """
        # Row-major upper is column-major lower: the same memory, so nothing is copied.
        side, band = gram.shape[0], min(BAND, max(gram.shape[0] - 1, 0))
        banded, tau, size = np.zeros((side, band + 1)), np.zeros(side), np.zeros(1)
        self._with_room("dsytrd_sy2sb", b"L", side, band, gram, side, banded, band + 1, tau)
        diagonal, off, house = np.zeros(side), np.zeros(side), np.zeros(1)
        second = (b"Y", b"N", b"L", side, band, banded, band + 1, diagonal, off)
        self._call("dsytrd_sb2st", *second, house, -1, size, -1)
        lengths = int(house[0]), int(size[0])
        self._call("dsytrd_sb2st", *second, np.zeros(lengths[0]), lengths[0], np.zeros(lengths[1]), lengths[1])
        self._call("dsterf", side, diagonal, off)
        return diagonal

    def tridiagonal(self, gram: Matrix) -> Tridiagonal:
        """Reduce a symmetric matrix to tridiagonal form in place; only its upper triangle is read.

        Parameters
        ----------
        gram : (side, side) float64, C-contiguous

        Raises
        ------
        numpy.linalg.LinAlgError
            If LAPACK reports failure.
        """
        side = gram.shape[0]
        diagonal, off, tau = np.zeros(side), np.zeros(side), np.zeros(side)
        self._with_room("dsytrd", b"L", side, gram, side, diagonal, off, tau)
        return Tridiagonal(self, gram, tau, diagonal, off)

    def _with_room(self, name: str, *arguments: Argument) -> None:
        """Ask how much room a routine works best with, then call it."""
        size = np.zeros(1)
        self._call(name, *arguments, size, -1)
        self._call(name, *arguments, np.zeros(int(size[0])), int(size[0]))

    def _call(self, name: str, *arguments: Argument) -> None:
        """Call by reference as Fortran does; text arguments pass their length at the end."""
        info = self._integer(0)
        references: list[Any] = []
        for argument in arguments:
            if isinstance(argument, bytes):
                references.append(ctypes.c_char_p(argument))
            elif isinstance(argument, int):
                references.append(ctypes.byref(self._integer(argument)))
            else:
                references.append(_at(argument))
        lengths = [ctypes.c_size_t(1) for argument in arguments if isinstance(argument, bytes)]
        self._lapack[name](*references, ctypes.byref(info), *lengths)
        if info.value != 0:
            message = f"LAPACK {name} returned {info.value}"
            raise np.linalg.LinAlgError(message)


@dataclass(frozen=True, slots=True)
class Tridiagonal:
    """A symmetric matrix reduced to tridiagonal form: all eigenvalues and chosen eigenvectors come from it."""

    library: OpenBlas
    reflectors: Matrix
    tau: Matrix
    diagonal: Matrix
    off: Matrix

    def eigenvalues(self) -> Matrix:
        """All eigenvalues, ascending."""
        values = self.diagonal.copy()
        self.library._call("dsterf", len(values), values, self.off.copy())
        return values

    def eigenvectors(self, count: int) -> Matrix:
        """Compute the eigenvectors of the ``count`` ≥ 1 largest eigenvalues, largest first, as rows (count, side).

        References
        ----------
        Dhillon, Parlett & Voemel, The design and implementation of the MRRR algorithm, ACM TOMS 2006.
        """
        side, integer = len(self.diagonal), np.dtype(self.library._integer)
        values, vectors, bound = np.zeros(side), np.zeros((count, side)), np.zeros(1)
        found, support, retry = np.zeros(1, integer), np.zeros(2 * count, integer), np.ones(1, integer)
        span = (side, self.diagonal.copy(), self.off.copy(), bound, bound, side - count + 1, side)
        room, whole = np.zeros(18 * side), np.zeros(10 * side, integer)
        out = (found, values, vectors, side, count, support, retry)
        self.library._call("dstemr", b"V", b"I", *span, *out, room, len(room), whole, len(whole))
        turn = (b"L", b"L", b"N", side, count, self.reflectors, side, self.tau, vectors, side)
        self.library._with_room("dormtr", *turn)
        return vectors[::-1].copy()


def _at(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


@cache
def find_openblas() -> OpenBlas | None:
    """Return the OpenBLAS of this process, if it has the routines and they solve a small problem to rounding."""
    sample = np.random.default_rng(0).standard_normal((3 * BAND, 2 * BAND))
    for entry in threadpool_info():
        if entry["internal_api"] != "openblas":
            continue
        try:
            found = OpenBlas(ctypes.CDLL(entry["filepath"]))
        except (OSError, AttributeError, StopIteration):
            continue
        if _is_right(found, sample) and _is_right(found, np.ascontiguousarray(sample.T)):
            return found
    return None


def _is_right(library: OpenBlas, sample: Matrix) -> bool:
    tall = sample.shape[0] > sample.shape[1]
    exact = sample.T @ sample if tall else sample @ sample.T
    gram = np.zeros_like(exact)
    library.add_gram(gram, sample, of_columns=tall)
    top = float(np.abs(exact).max())
    if np.abs(gram - np.triu(exact)).max() > 1e-13 * top:
        return False
    try:
        reduced = library.tridiagonal(gram.copy())
        top_vectors = reduced.eigenvectors(3)
        values = np.linalg.eigvalsh(exact)
        misses = (
            library.eigenvalues_in_place(gram) - values,
            reduced.eigenvalues() - values,
            top_vectors @ exact - values[:-4:-1, None] * top_vectors,
        )
        return bool(max(np.abs(miss).max() for miss in misses) < 1e-12 * top * len(exact))
    except np.linalg.LinAlgError:
        return False
