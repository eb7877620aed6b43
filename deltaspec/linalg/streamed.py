"""A matrix that arrives in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class Streamed:
    """One matrix D that is never whole in memory unless its owner holds it.

    Parameters
    ----------
    blocks : callable
        Each call starts again over D in float64 blocks along its longer axis: rows of a tall D, columns of a wide one.
        A block may be overwritten once the next one is asked for.
    shape : (d_out, d_in)
    device : torch.device
        Where blocks arrive and the work is done.
    hold : callable, optional
        Returns D whole in float32 where the owner can give it, for ``blocks`` to read from then on; or None.
    """

    blocks: Blocks
    shape: tuple[int, int]
    device: torch.device
    hold: Callable[[], Tensor | None] | None = None

    def tall(self) -> Iterator[Tensor]:
        """Blocks of rows of D, or of Dᵀ where D is wide."""
        for block in self.blocks():
            yield block if self.shape[0] >= self.shape[1] else block.mT
