"""Where one matrix lies inside a stored tensor, and how it is taken out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class View:
    """How one matrix (d_out, d_in) lies inside a stored tensor.

    Read in this order: take ``expert`` along the leading axis (stacks of experts); flatten trailing axes so that
    two remain (convolutions: out, in·k·k); transpose if stored as (d_in, d_out); then the rows are ``groups`` equal
    groups, and this matrix takes rows ``start:stop`` of each (fused projections; one group when they are contiguous).

    Examples
    --------
    Of a fused projection whose rows take turns between two parts, the second part:

    >>> import torch
    >>> View((2, 3), groups=2, start=1, stop=2).read(torch.arange(12).view(4, 3)).tolist()
    [[3, 4, 5], [9, 10, 11]]
    """

    shape: tuple[int, int]
    expert: int | None = None
    transposed: bool = False
    groups: int = 1
    start: int = 0
    stop: int | None = None

    def split(self, rows: int) -> tuple[int, int, int]:
        """Return the rows of each group of a whole matrix, and where this matrix begins and ends in each.

        Raises
        ------
        ValueError
            If so many rows have no such groups; it says why, for a sentence that names tensor and file.
        """
        height = rows // max(self.groups, 1)
        stop = height if self.stop is None else self.stop
        if self.groups < 1 or rows % self.groups or not 0 <= self.start <= stop <= height:
            message = f"{rows} rows in {self.groups} groups have no rows {self.start} to {stop} each"
            raise ValueError(message)
        return height, self.start, stop

    def orient(self, stored: Tensor) -> Tensor:
        """Return the whole matrix that this one is rows of: expert taken, trailing axes flattened, transposed.

        Parameters
        ----------
        stored : Tensor, two or more axes, three where there are experts

        Returns
        -------
        Tensor, (rows, d_in)
            No copy where strides allow.

        Raises
        ------
        ValueError
            If the tensor has no such expert, or is no matrix.
        """
        if self.expert is not None:
            if stored.ndim < 3 or not 0 <= self.expert < stored.shape[0]:
                message = f"it has no expert {self.expert}"
                raise ValueError(message)
            stored = stored[self.expert]
        if stored.ndim < 2:
            message = "it is no matrix"
            raise ValueError(message)
        flat = stored.flatten(1)
        return flat.mT if self.transposed else flat

    def take(self, whole: Tensor, *, axis: int = 0) -> Tensor:
        """Return this matrix's rows of the whole matrix, or of what lies along its rows (outputs, indices, a bias).

        Parameters
        ----------
        whole : Tensor, (…, rows, …)
        axis : int
            Which axis the rows are.

        Returns
        -------
        Tensor, (…, d_out, …)
            No copy where strides allow.

        Raises
        ------
        ValueError
            As of ``split``.
        """
        axis %= whole.ndim
        height, start, stop = self.split(whole.shape[axis])
        grouped = whole.reshape(*whole.shape[:axis], self.groups, height, *whole.shape[axis + 1 :])
        return grouped.narrow(axis + 1, start, stop - start).flatten(axis, axis + 1)

    def read(self, stored: Tensor) -> Tensor:
        """Return this matrix, (d_out, d_in), out of a stored tensor; no copy where strides allow.

        Raises
        ------
        ValueError
            If the stored shape does not fit.
        """
        matrix = self.take(self.orient(stored))
        if tuple(matrix.shape) != self.shape:
            message = f"found {tuple(matrix.shape)}"
            raise ValueError(message)
        return matrix
