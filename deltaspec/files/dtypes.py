"""The one table of dtypes: their names everywhere, sizes, and the grids that their numbers lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers of a float dtype: mantissa bits below the leading one, and the smallest normal exponent.

    ``coarser`` names the dtypes on whose grids values may still lie that were upcast to this one on saving.
    """

    mantissa: int
    min_exponent: int
    coarser: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype.

    ``name`` is the safetensors format's (BF16), ``kind`` torch's and config.json's (bfloat16), ``option`` that of
    --dtype (bf16), "" where that cannot be asked for. ``width`` is in bytes. ``storable`` is false where the format
    has no such dtype; pickled files may hold it.
    """

    name: str
    kind: str
    width: int
    option: str = ""
    grid: Grid | None = None
    storable: bool = True

    @property
    def torch(self) -> torch.dtype:
        """Torch's own; AttributeError where this torch is too old for it."""
        import torch  # so that the command line can say what it takes without it

        found: torch.dtype = getattr(torch, self.kind)
        return found

    @property
    def computes(self) -> bool:
        """Whether models compute in it: floats of 16 bits and more."""
        return self.grid is not None and self.width > 1


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("F64", "float64", 8, grid=Grid(52, -1022, coarser=("F32", "F16", "BF16"))),
        Dtype("F32", "float32", 4, "fp32", Grid(23, -126, coarser=("F16", "BF16"))),
        Dtype("F16", "float16", 2, "fp16", Grid(10, -14, coarser=("BF16",))),
        Dtype("BF16", "bfloat16", 2, "bf16", Grid(7, -126)),
        Dtype("F8_E4M3", "float8_e4m3fn", 1, grid=Grid(3, -6)),
        Dtype("F8_E5M2", "float8_e5m2", 1, grid=Grid(2, -14)),
        Dtype("F8_E4M3FNUZ", "float8_e4m3fnuz", 1, storable=False),
        Dtype("F8_E5M2FNUZ", "float8_e5m2fnuz", 1, storable=False),
        Dtype("F8_E8M0", "float8_e8m0fnu", 1),
        Dtype("C64", "complex64", 8),
        Dtype("BOOL", "bool", 1),
        *(
            Dtype(f"{sign or 'i'}{8 * width}".upper(), f"{sign}int{8 * width}", width)
            for sign in ("", "u")
            for width in (1, 2, 4, 8)
        ),
    )
}
OPTIONS = {dtype.option: dtype for dtype in DTYPES.values() if dtype.option}
"""By the names that --dtype takes."""
GRIDS = {dtype.name: dtype.grid for dtype in DTYPES.values() if dtype.grid}
"""Of the floats: a tensor of another dtype is no weight."""
NAMES = {f"torch.{dtype.kind}": dtype.name for dtype in DTYPES.values()}


def name_of(dtype: torch.dtype) -> str:
    """Name a dtype of torch as the safetensors format does; torch's own name where neither format nor table has it.

    >>> import torch
    >>> name_of(torch.bfloat16), name_of(torch.complex128)
    ('BF16', 'complex128')
    """
    return NAMES.get(str(dtype), str(dtype).removeprefix("torch."))
