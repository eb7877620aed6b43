"""An adapter that is being made: the modules it changes, and the tensors to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaspec.types.stored import Shape, WeightPair

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModulePair:
    """One module (or bare parameter) of the base that an adapter may change, with the matrices that it holds.

    ``name`` is its tensor in the base, ``path`` its module path; of kind ``stack`` the parameter's own path. ``kind``
    is linear, conv1d (GPT-2's, stored as (d_in, d_out)), embedding, conv, or stack (experts on a leading axis).
    ``pairs`` is one whole matrix, or the parts of a fused one in the order of their rows, or those of a stack's experts
    in order. ``shape`` (d_out, d_in) is that of the whole matrix, or of one expert; ``kernel`` the trailing axes of a
    convolution as stored (in, k, …). ``experts`` is the size of a stack, else 0; ``transposed`` marks one stored as
    (experts, d_in, d_out).
    """

    name: str
    path: str
    kind: str
    shape: tuple[int, int]
    pairs: tuple[WeightPair, ...]
    kernel: Shape = ()
    transposed: bool = False
    experts: int = 0

    def wholes(self) -> list[list[WeightPair]]:
        """Return the pairs that make up each whole matrix: of every expert, some without any, or of the module."""
        if not self.experts:
            return [list(self.pairs)]
        found: list[list[WeightPair]] = [[] for _ in range(self.experts)]
        for pair in self.pairs:
            found[pair.key.expert or 0].append(pair)
        return found


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """What an adapter holds for one module, ready to be written; factors are read only then.

    ``kind``, ``path``, ``shape`` and ``kernel`` as in ModulePair; ``experts`` is the size of a stack, else 0. ``rank``
    is the stored one; ``read`` returns lora_A (k, d_in) and lora_B (d_out, k), k ≤ rank, of a stack
    (experts, k, d_in) and (experts, d_out, k), for a scaling of exactly 1. ``read_bias`` returns the change of the
    module's bias, (d_out,), where the adapter carries it. ``transposed`` marks a stack stored (experts, d_in, d_out).
    """

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int
    read: Callable[[], tuple[Tensor, Tensor]]
    kernel: Shape = ()
    experts: int = 0
    read_bias: Callable[[], Tensor] | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written: its name, shape and dtype name, and how to get it when its turn comes."""

    name: str
    shape: Shape
    dtype: str
    read: Callable[[], Tensor]
