"""S = Σ x·xᵀ of vectors that come a few at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.errors import NumericalError
from deltaspec.linalg.openblas import find_openblas

ROWS = 4096  # vectors turned to float64 at once
ENOUGH = 256  # vectors that are worth a pass over S


class GramSum:
    """S = Σ x·xᵀ, (side, side) float64, growing with each block of vectors; the lower triangle is never read.

    Few vectors wait until they are worth a pass over S: each addition passes over all of it.

    Parameters
    ----------
    side : int
        Elements of one vector.
    device : torch.device
        Where the vectors arrive and S is kept.

    Examples
    --------
    >>> sums = GramSum(2, device=torch.device("cpu"))
    >>> sums.add(torch.tensor([[1.0, 2.0]]))
    >>> sums.add(torch.tensor([[3.0, 0.0]]))
    >>> sums.result().triu()
    tensor([[10.,  2.],
            [ 0.,  4.]], dtype=torch.float64)
    """

    def __init__(self, side: int, *, device: torch.device) -> None:
        self._sum = torch.zeros(side, side, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []
        self._library = find_openblas() if device.type == "cpu" else None

    def add(self, rows: Tensor) -> None:
        """Add x·xᵀ of each row.

        Parameters
        ----------
        rows : Tensor, (n, side), any float dtype
            Copied before it returns.

        Raises
        ------
        NumericalError
            If it holds NaN or infinity.
        """
        for start in range(0, len(rows), ROWS):
            block = rows[start : start + ROWS].to(torch.float64, copy=True)
            if not bool(torch.isfinite(block.sum())):
                message = "it holds NaN or infinity."
                raise NumericalError(message)
            self._waiting.append(block)
            if sum(map(len, self._waiting)) >= ENOUGH:
                self._add_waiting()

    def result(self) -> Tensor:
        """Return S of all that was added: its upper triangle; what is below is undefined."""
        self._add_waiting()
        return self._sum

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        block = torch.cat(self._waiting)
        self._waiting.clear()
        if self._library:
            self._library.add_gram(self._sum.numpy(), block.numpy(), of_columns=True)
        else:
            self._sum.addmm_(block.mT, block)
