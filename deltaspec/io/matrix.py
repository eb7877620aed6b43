"""From a place in a checkpoint to a matrix (d_out, d_in): view, transpose, slice, dequantise."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.files import tensor_reader
from deltaspec.files.dtypes import DTYPES
from deltaspec.io import pickled
from deltaspec.io.file_formats import is_pickled
from deltaspec.io.scales import decode_scale, dequantise, fit_block, scale_grid
from deltaspec.types import LowRankDelta, LowRankSource, LowRankTerm, MatrixSource, Pieces, TensorSpec, View

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def read_tensor(spec: TensorSpec) -> Tensor:
    """Read one whole tensor in its stored dtype, without its scale; mapped from the file where that is possible.

    Raises
    ------
    CheckpointError
        If the file is gone, damaged, or no longer what its header said.
    """
    if spec.pieces:
        return _join(spec, spec.pieces)
    tensor = pickled.load_tensor(spec) if is_pickled(spec.file) else tensor_reader.load_tensor(spec)
    if tuple(tensor.shape) != spec.shape:
        message = (
            f"Cannot read '{spec.name}' from '{spec.file}': expected shape {spec.shape}, found {tuple(tensor.shape)}; "
            "the file has changed since it was opened, start again."
        )
        raise CheckpointError(message)
    return tensor


def _join(spec: TensorSpec, pieces: Pieces) -> Tensor:
    """Put a tensor together from the stored ones; only where there are several, or rows move, is it copied, once."""
    if len(pieces.parts) == 1 and not pieces.heads:
        return read_tensor(pieces.parts[0])
    whole = torch.empty(spec.shape, dtype=DTYPES[spec.dtype].torch)
    bits = BITS[whole.element_size()]  # torch moves no rows of fp8
    target, half, start = whole.view(bits), spec.shape[0] // max(2 * pieces.heads, 1), 0
    for part in pieces.parts:
        values = read_tensor(part).view(bits)
        stop = start + part.shape[pieces.axis]
        if pieces.heads:
            rows = torch.arange(start, stop)
            head, row = rows // (2 * half), rows % (2 * half)
            target[head * 2 * half + row % 2 * half + row // 2] = values
        else:
            target.narrow(pieces.axis, start, stop - start).copy_(values)
        start = stop
    return whole


def read_values(spec: TensorSpec) -> Tensor:
    """Read one whole tensor, of any shape: as stored, or float64 where a scale dequantises it.

    Raises
    ------
    CheckpointError
        As of ``read_tensor``.
    """
    stored = read_tensor(spec)
    if spec.scale is None:
        return stored
    scale = decode_scale(read_tensor(spec.scale)).reshape(scale_grid(spec.shape, spec.scale.shape))
    return stored.double() * scale if stored.ndim < 2 else dequantise(stored, scale, spec.block or (1, 1))


class StoredMatrix:
    """A matrix (d_out, d_in) that stays in its file until rows or columns of it are asked for.

    It maps the file for itself alone: dropping the object, and what was taken from it, gives the memory back.
    """

    def __init__(self, source: MatrixSource) -> None:
        """Map the tensor and lay the view over it; see ``open_matrix``."""
        spec, view = source.spec, source.view
        self.shape = view.shape
        self.dtype = spec.dtype
        self._start = view.start if view.groups == 1 else None  # rows in one piece need no copy
        stored = read_tensor(spec)
        try:
            self._whole = view.orient(stored)
            self._ids = view.take(torch.arange(self._whole.shape[0]))
        except ValueError as cause:
            raise _unfit(spec, view, str(cause)) from cause
        found = (len(self._ids), self._whole.shape[1])
        if found != view.shape:
            raise _unfit(spec, view, f"found {found}")
        self._scale = _read_scale(spec, spec.scale, self._whole, view=view) if spec.scale else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start:stop, (stop - start, d_in), as stored, or float64 where they were dequantised."""
        return self._take(slice(start, stop), slice(None))

    def columns(self, start: int, stop: int) -> Tensor:
        """Return columns start:stop, (d_out, stop - start), as stored, or float64 where they were dequantised."""
        return self._take(slice(None), slice(start, stop))

    @property
    def scaled(self) -> bool:
        """Whether the stored numbers are codes that a scale multiplies."""
        return self._scale is not None

    def codes(self, span: slice, *, axis: int) -> tuple[Tensor, Tensor]:
        """Return a scaled matrix's stored codes, and each one's scale in float64: rows (axis 0) or columns (axis 1)."""
        values, rows, columns = self._cut(*((span, slice(None)) if axis == 0 else (slice(None), span)))
        scale, block = self._scale or (torch.ones(1, 1, dtype=torch.float64), self.shape)
        return values, scale[rows // block[0]][:, columns // block[1]]

    def _cut(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return stored values, and which rows and columns of the whole tensor they are."""
        ids = self._ids[rows]
        values = self._whole[:, columns]
        if self._start is None:
            values = values.index_select(0, ids)  # which torch has for fp8 too
        else:
            values = values.narrow(0, self._start, self.shape[0])[rows]
        return values, ids, torch.arange(self.shape[1])[columns]

    def _take(self, rows: slice, columns: slice) -> Tensor:
        values, ids, places = self._cut(rows, columns)
        if self._scale is None:
            return values
        scale, block = self._scale
        return dequantise(values, scale, block, rows=ids, columns=places)


def open_matrix(source: MatrixSource) -> StoredMatrix:
    """Open one matrix of a checkpoint, (d_out, d_in), mapped and not yet read.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or the stored shape does not fit the view.
    """
    return StoredMatrix(source)


def read_low_rank(source: LowRankSource) -> LowRankDelta:
    """Read the factors of Σ scaling·B·A as one pair, side by side along r, scaling folded into lora_B.

    Of a stack the view's expert is read; a transposed view says that PEFT takes its inputs for outputs.

    Returns
    -------
    LowRankDelta
        lora_A (Σr, d_in) and lora_B (d_out, Σr), float64.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or the stored shapes do not fit each other or the view.
    """
    d_out, d_in = source.view.shape
    pieces_A = [torch.zeros(0, d_in, dtype=torch.float64)]
    pieces_B = [torch.zeros(d_out, 0, dtype=torch.float64)]
    for term in source.terms:
        lora_A, lora_B = (read_tensor(spec).flatten(1) for spec in (term.lora_A, term.lora_B))
        if term.experts:
            lora_A, lora_B = _unfold(lora_A, lora_B, term, source.view)
        lora_A, lora_B = lora_A.to(torch.float64), lora_B.to(torch.float64)  # of a stack, one expert's alone
        if term.embedding or source.view.transposed:
            lora_A, lora_B = lora_B.mT, lora_A.mT
        try:
            lora_B = source.view.take(lora_B)
        except ValueError as cause:
            raise _unfit(term.lora_B, source.view, str(cause)) from cause
        found = (lora_B.shape[0], lora_A.shape[1])
        if lora_B.shape[1] != lora_A.shape[0] or found != source.view.shape:
            raise _unfit(term.lora_B, source.view, f"found {found} at ranks {lora_B.shape[1]} and {lora_A.shape[0]}")
        pieces_A.append(lora_A)
        pieces_B.append(lora_B * term.scaling)
    return LowRankDelta(lora_A=torch.cat(pieces_A), lora_B=torch.cat(pieces_B, dim=1))


def _unfold(lora_A: Tensor, lora_B: Tensor, term: LowRankTerm, view: View) -> tuple[Tensor, Tensor]:
    """Take one expert's factors: lora_A folds (expert, r), lora_B (r, expert)."""
    expert, count = view.expert, term.experts
    if expert is None or not 0 <= expert < count or lora_A.shape[0] % count or lora_B.shape[1] % count:
        raise _unfit(term.lora_A, view, f"its {count} experts have no expert {expert}")
    return lora_A.view(count, -1, lora_A.shape[1])[expert], lora_B.reshape(lora_B.shape[0], -1, count)[:, :, expert]


def _read_scale(
    spec: TensorSpec, companion: TensorSpec, whole: Tensor, *, view: View
) -> tuple[Tensor, tuple[int, int]]:
    """Read a tensor's scales as a grid over its oriented matrix, and the block that each covers."""
    scale = decode_scale(read_tensor(companion)).reshape(scale_grid(spec.shape, companion.shape))
    if view.expert is not None and scale.shape[0] == 1:
        scale = scale.expand(spec.shape[0], *scale.shape[1:])
    try:
        scale = view.orient(scale)
    except ValueError as cause:
        raise _unfit(companion, view, str(cause)) from cause
    rows, columns = spec.block or (1, 1)
    default = (columns, rows) if view.transposed else (rows, columns)
    block = fit_block(tuple(whole.shape), tuple(scale.shape), default)
    if block is None:
        raise _unfit(spec, view, f"its scales have shape {companion.shape}")
    return scale, block


def _unfit(spec: TensorSpec, view: View, found: str) -> CheckpointError:
    message = (
        f"Cannot read '{spec.name}' in '{spec.file}' as a matrix {view.shape}: it is stored as {spec.shape}, {found}; "
        "check that config.json belongs to these weights."
    )
    return CheckpointError(message)
