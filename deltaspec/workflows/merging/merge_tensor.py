"""One tensor of a merged checkpoint: read, changed, cast."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.io.matrix import StoredMatrix, open_matrix, read_low_rank, read_tensor, read_values
from deltaspec.linalg.truncated import truncate_product
from deltaspec.merging.apply import Loss, Rows, Summands, merge_block, merge_rows, row_blocks
from deltaspec.types import MatrixKey, MatrixSource, Shape, TensorSpec, View
from deltaspec.workflows.merging.grown import base_rows
from deltaspec.workflows.merging.tensor_changes import Part, TensorChange

Found = Callable[[MatrixKey, Shape, Loss], None]


def copy_tensor(spec: TensorSpec, dtype: torch.dtype | None) -> Tensor:
    """Return a stored tensor as it is (None), or cast to ``dtype``, dequantised where it has scales.

    Raises
    ------
    NumericalError
        If a value does not fit the dtype, naming the tensor.
    """
    stored = read_tensor(spec)
    if dtype is None or stored.dtype == dtype:
        return stored
    out = torch.empty(spec.shape, dtype=dtype)
    if spec.scale is None:
        out.copy_(stored)
    elif len(spec.shape) not in (2, 3):
        out.copy_(read_values(spec))
    else:
        stack = [View(spec.shape)] if len(spec.shape) == 2 else [View(spec.shape[1:], e) for e in range(spec.shape[0])]  # type: ignore[arg-type]
        for view in stack:
            matrix, place = open_matrix(MatrixSource(spec, view)), view.orient(out)
            for start, stop in row_blocks(view.shape):
                place[start:stop] = matrix.rows(start, stop)
    if not bool(torch.isfinite(out).all()) and bool(torch.isfinite(stored.double()).all()):
        kind = str(dtype).removeprefix("torch.")
        message = f"Cannot store '{spec.name}' of '{spec.file}' as {kind}: values overflow; pass --dtype bf16 or fp32."
        raise NumericalError(message)
    return out


def merge_tensor(change: TensorChange, *, dtype: torch.dtype, found: Found) -> Tensor:
    """Return what a changed tensor becomes, rounded once to ``dtype``.

    Parameters
    ----------
    change : TensorChange
    dtype : torch.dtype
    found : callable
        Called with each changed matrix's key, shape and loss.

    Raises
    ------
    NumericalError
        If the result is not finite, naming the tensor.
    """
    source = change.spec if change.whole is None else change.whole
    covered = sum(math.prod(part.view.shape) for part in change.parts.values())
    complete = covered == math.prod(change.shape)
    out = torch.empty(change.shape, dtype=dtype) if complete else copy_tensor(source, dtype).clone()
    try:
        for part in change.parts.values():
            found(part.key, part.view.shape, _merge_part(change, part, out))
        if not change.parts:
            found(change.key, change.shape, _merge_vector(change, out))
    except NumericalError as cause:
        message = f"Cannot merge '{change.spec.name}' of '{change.spec.file}': {cause}."
        raise NumericalError(message) from cause
    return out


def _merge_part(change: TensorChange, part: Part, out: Tensor) -> Loss:
    """Write one matrix of a tensor into its place in ``out``."""
    view = part.view
    base = base_rows(change, view)
    whole = None if change.whole is None else open_matrix(MatrixSource(change.whole, view))
    place = view.orient(out)
    scattered = None if view.groups == 1 else view.take(torch.arange(place.shape[0]))

    def store(start: int, stop: int, rows: Tensor) -> None:
        if scattered is None:
            place[view.start + start : view.start + stop] = rows
        else:
            place[scattered[start:stop]] = rows

    replaced = whole.rows if isinstance(whole, StoredMatrix) else None
    summands = Summands(base, _update_of(part), replaced, change.share)
    return merge_rows(summands, store, shape=view.shape, dtype=out.dtype)


def _update_of(part: Part) -> Rows:
    """Return what gives rows of Σ scaling·B·A, float64."""
    factors = [read_low_rank(source) for source in part.factors]
    lora_A = torch.cat([torch.zeros(0, part.view.shape[1], dtype=torch.float64), *(f.lora_A for f in factors)])
    lora_B = torch.cat([torch.zeros(part.view.shape[0], 0, dtype=torch.float64), *(f.lora_B for f in factors)], dim=1)
    if len(factors) > 1 and not truncate_product(lora_B, lora_A, rank=1).singular_values.numel():
        lora_A, lora_B = lora_A[:0], lora_B[:, :0]  # they cancel: what is left is rounding
    return lambda start, stop: lora_B[start:stop] @ lora_A


def _merge_vector(change: TensorChange, out: Tensor) -> Loss:
    """Write a vector, or a bias of any shape, into ``out``; rows that only the replacement has are there already."""
    base = read_values(change.spec)
    rows = min(base.shape[0], out.shape[0]) if base.ndim else None
    update = torch.zeros(base.shape, dtype=torch.float64)
    for bias, factor, start in change.biases:
        update[start : start + bias.shape[0]] += read_tensor(bias).double() * factor
    whole = None if change.whole is None else read_values(change.whole)
    if rows is None:
        merged, loss = merge_block(base, update, dtype=out.dtype, whole=whole, share=change.share)
        out.copy_(merged)
        return loss
    whole = None if whole is None else whole[:rows]
    out[:rows], loss = merge_block(base[:rows], update[:rows], dtype=out.dtype, whole=whole, share=change.share)
    return loss
