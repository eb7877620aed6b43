"""Whole blocks that only one of two checkpoints has: of them nothing can be said, and that is no footnote."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.names import natural_order
from deltaspec.pairing.plan import Plan, chosen, unreadable
from deltaspec.types import Checkpoint, NoteKind, OneSidedBlocks, TensorSpec


def list_one_sided(plan: Plan, base: Checkpoint, tuned: Checkpoint, options: AnalyzeOptions) -> list[OneSidedBlocks]:
    """List, side by side, the blocks none of whose matrices has a counterpart.

    A block is all that lies behind a number in a path (a layer, an expert), or a layer's experts, with two matrices or
    more: a head, a lone tensor or a buffer is none. Of blocks in blocks the outermost counts.

    Parameters
    ----------
    plan : Plan
        Complete.
    base, tuned : Checkpoint
    options : AnalyzeOptions
        What ``include`` and ``exclude`` keep out is not missed.
    """
    alone = {note.tensor for note in plan.skipped if note.kind is NoteKind.ONE_SIDED and chosen(note.tensor, options)}
    sides = (("base", base, tuned), ("tuned", tuned, base))
    rows = (_list_side(side, own, alone - other.tensors.keys()) for side, own, other in sides)
    return [row for row in rows if row]


def _list_side(side: str, checkpoint: Checkpoint, alone: set[str]) -> OneSidedBlocks | None:
    matrices: defaultdict[str, list[str]] = defaultdict(list)
    for name, spec in checkpoint.tensors.items():
        if _is_matrix(name, spec):
            for block in _blocks(name):
                matrices[block].append(name)
    whole = {block for block, names in matrices.items() if len(names) > 1 and alone.issuperset(names)}
    outermost = {next((b for b in _blocks(name) if b in whole), "") for name in alone & checkpoint.tensors.keys()} - {
        ""
    }
    if not outermost:
        return None
    inside = sum(_size(s) for n, s in checkpoint.tensors.items() if any(b in outermost for b in _blocks(n)))
    total = sum(map(_size, checkpoint.tensors.values()))
    example = min(outermost, key=natural_order)
    return {"side": side, "blocks": len(outermost), "share": inside / total, "example": example}


def _is_matrix(name: str, spec: TensorSpec) -> bool:
    return len(spec.shape) > 1 and not name.endswith("bias") and not unreadable(spec)


def _size(spec: TensorSpec) -> int:
    return 0 if unreadable(spec) else math.prod(spec.shape)


def _blocks(name: str) -> Iterator[str]:
    """Yield the paths of the blocks that a tensor lies in, the outermost first."""
    pieces = name.split(".")
    for i, piece in enumerate(pieces[:-1]):
        if piece.isdecimal() or piece == "experts":
            yield ".".join(pieces[: i + 1])
