"""Eigenvalues of a large symmetric matrix by two-stage tridiagonalisation, through the OpenBLAS that NumPy loaded.

Dense → band → tridiagonal does nearly all its work in matrix products, where the usual one-stage reduction does half
of it in matrix-vector products at memory speed. LAPACK has had it since 3.7, but neither NumPy nor SciPy nor torch
exposes it, so it is called in the library that NumPy brought, if that is OpenBLAS and answers a small problem right.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

BAND = 64  # width of the intermediate band: 4096² takes 5.4 CPU s at 32, 4.9 at 48, 4.8 at 64, and a fifth more as "U"
Matrix = NDArray[np.float64]


def two_stage_available() -> bool:
    """Tell whether this process has the routines and they solve a small problem to rounding."""
    return _library() is not None


def eigenvalues_in_place(gram: Matrix) -> Matrix:
    """Compute all eigenvalues of a symmetric matrix, ascending, destroying it; only its upper triangle is read.

    Parameters
    ----------
    gram : (side, side) float64, C-contiguous

    Returns
    -------
    (side,) float64

    Raises
    ------
    numpy.linalg.LinAlgError
        If LAPACK reports failure or the routines are not available.

    References
    ----------
    Haidar, Ltaief & Dongarra, Parallel reduction to condensed forms for symmetric eigenvalue problems, SC 2011.
    """
    library = _library()
    if library is None:
        message = "two-stage eigenvalues are not available in this process"
        raise np.linalg.LinAlgError(message)
    return library(gram)


@cache
def _library() -> Callable[[Matrix], Matrix] | None:
    """Find the routines in a loaded OpenBLAS, and believe them only after a test."""
    for entry in threadpool_info():
        if entry["internal_api"] != "openblas":
            continue
        try:
            solver = _Solver(ctypes.CDLL(entry["filepath"]))
        except (OSError, AttributeError):
            continue
        sample = np.random.default_rng(0).standard_normal((3 * BAND, 3 * BAND))
        sample = sample @ sample.T
        exact = np.linalg.eigvalsh(sample)
        if abs(solver(sample) - exact).max() < 1e-12 * exact[-1]:
            return solver
    return None


class _Solver:
    """The three LAPACK routines of one library, under whatever prefix and integer size it was built with."""

    def __init__(self, library: ctypes.CDLL) -> None:
        names = [(prefix, suffix) for prefix in ("scipy_", "") for suffix in ("_64_", "64_", "_")]
        prefix, suffix = next((p, s) for p, s in names if hasattr(library, f"{p}dsytrd_sy2sb{s}"))
        self.integer: Any = ctypes.c_int64 if "64" in suffix else ctypes.c_int32
        self.routines = {
            n: getattr(library, f"{prefix}{n}{suffix}") for n in ("dsytrd_sy2sb", "dsytrd_sb2st", "dsterf")
        }

    def _call(self, name: str, *arguments: object) -> None:
        """Call by reference as Fortran does; text arguments pass their length at the end."""
        info = self.integer(0)
        references: list[Any] = []
        for argument in arguments:
            if isinstance(argument, bytes):
                references.append(ctypes.c_char_p(argument))
            elif isinstance(argument, int):
                references.append(ctypes.byref(self.integer(argument)))
            else:
                references.append(np.asarray(argument).ctypes.data_as(ctypes.c_void_p))
        lengths = [ctypes.c_size_t(1) for argument in arguments if isinstance(argument, bytes)]
        self.routines[name](*references, ctypes.byref(info), *lengths)
        if info.value != 0:
            message = f"LAPACK {name} returned {info.value}"
            raise np.linalg.LinAlgError(message)

    def __call__(self, gram: Matrix) -> Matrix:
        # Row-major upper is column-major lower: the same memory, so nothing is copied.
        side, band = gram.shape[0], min(BAND, max(gram.shape[0] - 1, 0))
        banded, tau, size = np.zeros((side, band + 1)), np.zeros(side), np.zeros(1)
        first = (b"L", side, band, gram, side, banded, band + 1, tau)
        self._call("dsytrd_sy2sb", *first, size, -1)
        self._call("dsytrd_sy2sb", *first, np.zeros(int(size[0])), int(size[0]))
        diagonal, off, house = np.zeros(side), np.zeros(side), np.zeros(1)
        second = (b"Y", b"N", b"L", side, band, banded, band + 1, diagonal, off)
        self._call("dsytrd_sb2st", *second, house, -1, size, -1)
        lengths = int(house[0]), int(size[0])
        self._call("dsytrd_sb2st", *second, np.zeros(lengths[0]), lengths[0], np.zeros(lengths[1]), lengths[1])
        self._call("dsterf", side, diagonal, off)
        return diagonal
