"""ΔW of one pair, streamed in float64, with what storage rounding must leave in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltaspec.io.matrix import StoredMatrix, open_matrix
from deltaspec.linalg.numerics import GRIDS, UPCAST, binade, lies_on
from deltaspec.types import MatrixSource, Rounding

BLOCK = 1 << 19  # elements of a block: 4 MB in float64, so that passes over it stay in cache


class DenseDelta:
    """ΔW = W_tuned - W_base of two stored matrices, in blocks along the longer axis; never whole in memory.

    Files are opened for each pass and closed after it, so nothing stays mapped between matrices.

    Parameters
    ----------
    base, tuned : MatrixSource
        Of one shape (d_out, d_in).
    device : torch.device
        Where blocks are formed.

    Attributes
    ----------
    base_energy : float
        ‖W_base‖²_F, known after the first pass of ``blocks``.
    """

    def __init__(self, base: MatrixSource, tuned: MatrixSource, *, device: torch.device) -> None:
        self.base, self.tuned, self.device = base, tuned, device
        self.shape = base.view.shape
        self.base_energy = 0.0
        self._tally: _Tally | None = None

    def blocks(self) -> Iterator[Tensor]:
        """Yield ΔW in float64 blocks: rows of a tall matrix, columns of a wide one; each overwrites the last.

        Both sides are upcast before subtracting: in bf16 the difference alone would lose 3e-4 of itself.
        """
        base, tuned = open_matrix(self.base), open_matrix(self.tuned)
        tally = None if self._tally else _Tally(base, tuned, self.shape, device=self.device)
        for span, block in _spans(self.shape, self.device):
            block.copy_(_read(base, span, self.shape, self.device))
            if tally:
                tally.base_energy += _energy(block)
            after = _read(tuned, span, self.shape, self.device)
            torch.sub(after, block, out=block)
            if tally:
                tally.add(span, block, after)
            yield block
        if tally:
            self._tally, self.base_energy = tally, float(tally.base_energy)

    @property
    def rounding(self) -> Rounding:
        """What rounding must leave in ΔW; known after the first pass of ``blocks``."""
        if self._tally is None:
            for _ in self.blocks():
                pass
        assert self._tally is not None
        return self._tally.result()


def stream(source: MatrixSource, *, device: torch.device) -> Iterator[Tensor]:
    """Yield one stored matrix in float64 blocks along its longer axis; each overwrites the last.

    Parameters
    ----------
    source : MatrixSource
        Of shape (d_out, d_in).
    device : torch.device
    """
    shape, stored = source.view.shape, open_matrix(source)
    for span, block in _spans(shape, device):
        block.copy_(_read(stored, span, shape, device))
        yield block


def energy_of(source: MatrixSource, *, device: torch.device) -> float:
    """Return ‖W‖²_F of a stored matrix, float64."""
    return float(sum(_energy(block) for block in stream(source, device=device)))


def _energy(block: Tensor) -> Tensor:
    flat = block.reshape(-1)
    return torch.dot(flat, flat)


def _spans(shape: tuple[int, int], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Cut the longer axis into spans, each with its float64 buffer in the matrix's orientation."""
    long, side = max(shape), min(shape)
    step = max(64, BLOCK // max(side, 1))
    tall = shape[0] >= shape[1]
    room = torch.empty(min(step, long) * side, dtype=torch.float64, device=device)
    for start in range(0, long, step):
        length = min(step, long - start)
        piece = room[: length * side]
        yield slice(start, start + length), piece.view(length, side) if tall else piece.view(side, length)


def _read(stored: StoredMatrix, span: slice, shape: tuple[int, int], device: torch.device) -> Tensor:
    take = stored.rows if shape[0] >= shape[1] else stored.columns
    return take(span.start, span.stop).to(device)


class _Tally:
    """Counts over one pass: unchanged elements, and sums of squared spacings along both axes."""

    def __init__(
        self, base: StoredMatrix, tuned: StoredMatrix, shape: tuple[int, int], *, device: torch.device
    ) -> None:
        self.shape, self.tuned_dtype = shape, tuned.dtype
        # A quantised base was rounded too; any other base is what training started from, so it is exact.
        self.spaced = [stored for stored in (tuned, base) if stored is tuned or stored.scaled]
        self.grids = [grid for grid in UPCAST.get(tuned.dtype, ()) if not tuned.scaled]
        self.eps = GRIDS["F64"].mantissa if "F64" in (base.dtype, tuned.dtype) else GRIDS["F32"].mantissa
        self.base_energy = torch.zeros((), dtype=torch.float64, device=device)
        self.across = torch.zeros(min(shape), dtype=torch.float64, device=device)  # over the longer axis
        self.along_max = torch.zeros((), dtype=torch.float64, device=device)  # largest sum over the shorter axis
        self.changed = torch.zeros_like(self.base_energy)

    def add(self, span: slice, block: Tensor, after: Tensor) -> None:
        """Count one block of ΔW and the tuned weights it came from."""
        axis = 1 if self.shape[0] >= self.shape[1] else 0  # the shorter axis
        changed = block.sign().abs_().sum(axis)  # a count in float64: half the time of count_nonzero
        self.changed += changed.sum()
        self.grids = [grid for grid in self.grids if lies_on(after, grid=grid)]
        squares = self._squared_spacing(self.spaced[0], span, after)
        for stored in self.spaced[1:]:
            squares += self._squared_spacing(stored, span, None)
        if not bool(changed.all()):  # an untouched row or column was never rounded
            squares *= (changed > 0).unsqueeze(axis)
        self.along_max = torch.maximum(self.along_max, squares.sum(axis).max())
        self.across += squares.sum(1 - axis)

    def _squared_spacing(self, stored: StoredMatrix, span: slice, values: Tensor | None) -> Tensor:
        """(2^⌊log₂|w|⌋)² of stored values, times scale² where they are quantised; float32."""
        if stored.scaled:
            codes, scale = stored.codes(span, axis=0 if self.shape[0] >= self.shape[1] else 1)
            spacing = binade(codes.to(self.across.device), dtype=stored.dtype) * scale.to(self.across.device).float()
            return spacing.mul_(2.0 ** -GRIDS[stored.dtype].mantissa).square_()
        assert values is not None
        return binade(values, dtype=stored.dtype).square_()

    def result(self) -> Rounding:
        """Close the count."""
        grid = min(self.grids, key=lambda name: GRIDS[name].mantissa, default=self.tuned_dtype)
        unit = 1.0 if self.spaced[0].scaled else 4.0 ** -GRIDS[grid].mantissa
        tall = self.shape[0] >= self.shape[1]
        along, across = float(self.along_max) * unit, float(self.across.max()) * unit
        return Rounding(
            unchanged=1 - float(self.changed) / (self.shape[0] * self.shape[1]),
            ulp_energy=float(self.across.sum()) * unit,
            row_max=along if tall else across,
            column_max=across if tall else along,
            eps=2.0**-self.eps,
            grid=grid,
        )
