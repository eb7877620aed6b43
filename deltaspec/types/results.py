"""What a decomposition says of one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaspec.types.stored import MatrixKey

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """ΔW = lora_B @ lora_A, scaling included; (d_out, r) and (r, d_in), float64."""

    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True, slots=True)
class Rounding:
    """Storage rounding of one delta, predicted from the stored values, over rows or columns that changed at all.

    ``unchanged`` is the share of elements whose delta is exactly zero. With ulp the spacing of stored numbers at each
    tuned weight (and at each base weight too where that one is quantised), in units of the weights: ``ulp_energy`` =
    Σ ulp², ``row_max`` and ``column_max`` the largest sum of ulp² over a row and over a column. ``eps`` is the
    relative spacing of the arithmetic that the stored dtypes allow (2⁻²³ up to 32 bits, else 2⁻⁵²), and ``grid`` the
    dtype on whose grid the tuned values lie: the stored one, or a coarser one that was upcast on saving.
    """

    unchanged: float
    ulp_energy: float
    row_max: float
    column_max: float
    eps: float
    grid: str


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one matrix, and how far they can be trusted.

    ``singular_values`` (min(d_out, d_in),) float64, descending, in units of the weights; of a low-rank source only
    its r, for the others are exactly zero. ``energy`` = ‖·‖²_F in float64, summed from the elements where there are
    any. No value is wrong by more than ``error_bound``; on the
    Gram route a value σ is wrong by at most error_bound²/σ. ``left`` (d_out, k) and ``right`` (d_in, k) hold the top
    singular vectors where they were asked for.
    """

    singular_values: Tensor
    shape: tuple[int, int]
    energy: float
    method: str
    error_bound: float
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Truncation:
    """The top r singular triplets of one matrix, and how near to the best rank-r approximation they are.

    ``left`` (d_out, r), ``singular_values`` (r,) descending, ``right`` (d_in, r), float64, on the CPU. ``energy`` =
    ‖·‖²_F, exact. ``residual`` = ‖· - UΣVᵀ‖²_F, exact: never negative. ``excess`` is by what share the error
    √residual exceeds the Eckart-Young optimum: exact where ``values`` holds all singular values, else an estimate from
    the last iteration's gain. ``method`` names the route.
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor
    shape: tuple[int, int]
    energy: float
    residual: float
    excess: float
    method: str
    values: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """The result for one matrix, as the run directory stores it.

    ``metrics`` maps every name of METRICS to a number, a truth value, or None where the metric does not apply.
    """

    key: MatrixKey
    shape: tuple[int, int]
    base_dtype: str
    tuned_dtype: str
    spectrum_of: str
    metrics: dict[str, float | int | bool | None]
    method: str
    error_bound: float
    seconds: float
    device: str
    notes: tuple[str, ...] = ()

    @property
    def store_key(self) -> str:
        """The record's name in the run: its matrix's key, with #base or #tuned where it is not the delta's."""
        return str(self.key) if self.spectrum_of == "delta" else f"{self.key}#{self.spectrum_of}"

    def to_dict(self) -> dict[str, Any]:
        """One flat row: the key's fields, shape, dtypes and spectrum_of, then the metrics."""
        return {
            "tensor": self.key.tensor,
            "part": self.key.part,
            "role": self.key.role,
            "depth": self.key.depth,
            "expert": self.key.expert,
            "stack": self.key.stack,
            "d_out": self.shape[0],
            "d_in": self.shape[1],
            "base_dtype": self.base_dtype,
            "tuned_dtype": self.tuned_dtype,
            "spectrum_of": self.spectrum_of,
            **self.metrics,
            "method": self.method,
            "error_bound": self.error_bound,
        }
