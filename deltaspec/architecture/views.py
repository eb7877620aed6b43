"""Where the matrices of one stored tensor lie: fused projections, transposed storage, stacked experts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from deltaspec.errors import CheckpointError
from deltaspec.types import Shape, View

if TYPE_CHECKING:
    from torch import Tensor


def view_matrix(tensor: Tensor, view: View) -> Tensor:
    """Return the matrix (d_out, d_in) that a view names inside a stored tensor; no copy where strides allow.

    Parameters
    ----------
    tensor : Tensor, two or more axes, any dtype
        As stored.
    view : View
        In which order its fields are read is said there.

    Returns
    -------
    Tensor
        ``view.shape``, same dtype and device.

    Raises
    ------
    CheckpointError
        If the stored shape does not fit the view.
    """
    try:
        return view.read(tensor)
    except ValueError as cause:
        message = (
            f"Cannot read a matrix of shape {view.shape} from a stored tensor: expected one that fits {view}, "
            f"found shape {tuple(tensor.shape)}; check that both checkpoints have the same architecture."
        )
        raise CheckpointError(message) from cause


def whole(shape: Shape, *, expert: int | None = None, transposed: bool = False) -> View:
    """View a stored tensor, or one expert of a stack, as one matrix; trailing axes are flattened.

    Parameters
    ----------
    shape : tuple of int, two or more axes (three where ``expert`` is given)
    expert : int, optional
        Index on the leading axis.
    transposed : bool
        Whether the tensor is stored as (d_in, d_out).

    Returns
    -------
    View
        One group with all rows.
    """
    rows, *rest = shape if expert is None else shape[1:]
    columns = math.prod(rest)
    return View((columns, rows) if transposed else (rows, columns), expert=expert, transposed=transposed)


def equal_parts(view: View, count: int) -> tuple[View, ...]:
    """Split rows into equal consecutive blocks.

    Parameters
    ----------
    view : View, (rows, d_in)
        The fused matrix.
    count : int
        Number of parts.

    Returns
    -------
    tuple of View
        The parts in order; empty where the rows do not divide.
    """
    size, left = divmod(view.shape[0], count)
    return () if left else tuple(_rows(view, 1, start=part * size, stop=(part + 1) * size) for part in range(count))


def alternating_parts(view: View, count: int) -> tuple[View, ...]:
    """Split rows that take turns (part 0, part 1, part 0, …).

    Parameters
    ----------
    view : View, (rows, d_in)
        The fused matrix.
    count : int
        Number of parts.

    Returns
    -------
    tuple of View
        The parts in order; empty where the rows do not divide.
    """
    groups, left = divmod(view.shape[0], count)
    if left or not groups:
        return ()
    return tuple(_rows(view, groups, start=part, stop=part + 1) for part in range(count))


def attention_parts(view: View, heads: tuple[int, int, int], *, grouped: bool) -> tuple[View, ...]:
    """Split rows into queries, keys and values.

    Parameters
    ----------
    view : View, (rows, d_in)
        The fused projection.
    heads : tuple of int
        Query heads, key-value heads, rows of one head.
    grouped : bool
        Whether each key-value head lies beside its query heads (q…q k v, q…q k v, …), instead of all queries, then all
        keys, then all values.

    Returns
    -------
    tuple of View
        q, k, v; empty where the heads do not add up to the rows.
    """
    query, shared, size = heads
    if (query + 2 * shared) * size != view.shape[0] or query % shared:
        return ()
    groups = shared if grouped else 1
    ends = [0, query // groups * size, (query + shared) // groups * size, (query + 2 * shared) // groups * size]
    return tuple(_rows(view, groups, start=ends[part], stop=ends[part + 1]) for part in range(3))


def _rows(view: View, groups: int, *, start: int, stop: int) -> View:
    return replace(view, shape=(groups * (stop - start), view.shape[1]), groups=groups, start=start, stop=stop)
