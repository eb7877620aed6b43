"""ΔW of one pair, streamed in float64, with what storage rounding must leave in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltaspec.files.dtypes import GRIDS
from deltaspec.io.matrix import StoredMatrix, open_matrix
from deltaspec.linalg.numerics import binade, lies_on
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
        self._rounding: Rounding | None = None
        self._held: Tensor | None = None

    def blocks(self) -> Iterator[Tensor]:
        """Yield ΔW in float64 blocks: rows of a tall matrix, columns of a wide one; each overwrites the last.

        Both sides are upcast before subtracting: in bf16 the difference alone would lose 3e-4 of itself.
        """
        if self._held is not None:
            for span, block in _spans(self.shape, self.device):
                yield block.copy_(self._cut(self._held, span))
            return
        base, tuned = open_matrix(self.base), open_matrix(self.tuned)
        tally = None if self._rounding else _Tally(base, tuned, self.shape, device=self.device)
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
            # The tally holds both files; kept, it would leave them mapped while eigenvalues are computed.
            self._rounding, self.base_energy = tally.result(), float(tally.base_energy)

    def hold(self) -> Tensor | None:
        """Form ΔW whole in float32, (d_out, d_in), for later passes of ``blocks`` to read; None unless both are 16-bit.

        The difference of two bfloat16 or two float16 numbers fits float32, unless one is 2¹⁶ times the other, and then
        it is right to 2⁻²⁴ of itself.
        """
        if not {self.base.spec.dtype, self.tuned.spec.dtype} <= {"BF16", "F16"} or self.base.spec.scale:
            return None
        base, tuned = open_matrix(self.base), open_matrix(self.tuned)
        tally = _Tally(base, tuned, self.shape, device=self.device)
        whole = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for span, _ in _spans(self.shape, self.device):
            part = self._cut(whole, span).copy_(_read(base, span, self.shape, self.device))
            tally.base_energy += torch.linalg.vector_norm(part, dtype=torch.float64).square()
            after = _read(tuned, span, self.shape, self.device)
            torch.sub(after, part, out=part)
            tally.add(span, part, after)
        self._rounding, self.base_energy, self._held = tally.result(), float(tally.base_energy), whole
        return whole

    def _cut(self, whole: Tensor, span: slice) -> Tensor:
        return whole[span] if self.shape[0] >= self.shape[1] else whole[:, span]

    @property
    def rounding(self) -> Rounding:
        """What rounding must leave in ΔW; known after the first pass of ``blocks``."""
        if self._rounding is None:
            for _ in self.blocks():
                pass
        assert self._rounding is not None
        return self._rounding


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
    """Return ‖W‖²_F of a stored matrix, accumulated in float64, streamed block by block.

    Parameters
    ----------
    source : MatrixSource
    device : torch.device
        Where it is summed.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
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
    values = take(span.start, span.stop).to(device)
    return values.double() if stored.dtype.startswith("F8") else values  # fp8 promotes to nothing


class _Tally:
    """Counts over one pass: unchanged elements, and sums of squared spacings along both axes."""

    def __init__(
        self, base: StoredMatrix, tuned: StoredMatrix, shape: tuple[int, int], *, device: torch.device
    ) -> None:
        self.shape, self.tuned = shape, tuned
        # A quantised base was rounded too; any other base is what training started from, so it is exact.
        self.base = base if base.dtype.startswith("F8") else None
        self.grids = [grid for grid in GRIDS[tuned.dtype].coarser if not tuned.scaled]
        self.eps = GRIDS["F64" if "F64" in (base.dtype, tuned.dtype) else "F32"].mantissa
        self.base_energy = torch.zeros((), dtype=torch.float64, device=device)
        self.changed = torch.zeros_like(self.base_energy)
        # Sums over the longer axis, and over the shorter one: of tuned without its unit, of base with it.
        self.across = torch.zeros(2, min(shape), dtype=torch.float64, device=device)
        self.along: list[Tensor] = []

    def add(self, span: slice, block: Tensor, after: Tensor) -> None:
        """Count one block of ΔW and the tuned weights it came from."""
        axis = 1 if self.shape[0] >= self.shape[1] else 0  # the shorter axis
        changed = block.sign().abs_().sum(axis)  # a count of floats: half the time of count_nonzero
        self.changed += changed.sum()
        self.grids = [grid for grid in self.grids if lies_on(after, grid=grid)]
        squares = [_binades(self.tuned, span, after, axis=1 - axis).square_()]
        if self.base:
            values = _read(self.base, span, self.shape, block.device)
            unit = 2.0 ** -GRIDS[self.base.dtype].mantissa
            squares.append(_binades(self.base, span, values, axis=1 - axis).mul_(unit).square_())
        touched = changed > 0  # an untouched row or column was never rounded
        for side, square in enumerate(squares):
            if not bool(touched.all()):
                square *= touched.unsqueeze(axis)
            self.across[side] += square.sum(1 - axis)
        self.along.append(torch.stack([square.sum(axis) for square in squares]))

    def result(self) -> Rounding:
        """Close the count, with the spacing of the coarsest grid that all tuned values lie on."""
        grid = min(self.grids, key=lambda name: GRIDS[name].mantissa, default=self.tuned.dtype)
        units = torch.tensor([4.0 ** -GRIDS[grid].mantissa, 1.0], dtype=torch.float64, device=self.across.device)
        across = units @ self.across
        along = torch.cat(self.along, dim=1)
        long_max, short_max = float((units[: len(along)] @ along).max()), float(across.max())
        tall = self.shape[0] >= self.shape[1]
        return Rounding(
            unchanged=1 - float(self.changed) / (self.shape[0] * self.shape[1]),
            ulp_energy=float(across.sum()),
            row_max=long_max if tall else short_max,
            column_max=short_max if tall else long_max,
            eps=2.0**-self.eps,
            grid=grid,
        )


def _binades(stored: StoredMatrix, span: slice, values: Tensor, *, axis: int) -> Tensor:
    """2^⌊log₂|w|⌋ of stored numbers, times their scale where they are quantised; float64."""
    if not stored.scaled:
        return binade(values, dtype=stored.dtype).double()
    codes, scale = stored.codes(span, axis=axis)
    return binade(codes.to(values.device), dtype=stored.dtype).double().mul_(scale.to(values.device))
