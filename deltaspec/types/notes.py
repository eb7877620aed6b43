"""What a user is told beside the results: a kind, which code may branch on, and a text, which it never reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deltaspec.types.identity import SkippedTensor


class NoteKind(StrEnum):
    """What a note is about."""

    REMARK = "remark"  # nothing follows from it
    OPTIONS = "options"  # --include or --exclude keep a tensor out
    UNREADABLE = "unreadable"  # a tensor has no delta: no float, or empty
    HEAD = "head"  # a task head of another shape
    TIED = "tied"  # a tensor is another one under a second name
    LAYOUT = "layout"  # an adapter holds a tensor in a layout in which it cannot be merged
    WHOLE = "whole"  # an adapter holds a tensor whole, beside its factors
    FACTORS = "factors"  # an adapter's factors or bias, where a matrix or vector itself is wanted
    ONE_SIDED = "one-sided"  # only one side has a tensor
    UNTOUCHED = "untouched"  # how much of the base an adapter leaves as it is
    GROWN = "grown"  # rows of a vocabulary that only the tuned side has
    ADDED = "added"  # a tensor is new in the result


@dataclass(frozen=True, slots=True)
class Note:
    """One thing to be told, of a tensor where it is about one; it prints as its text."""

    kind: NoteKind
    text: str
    tensor: str = ""

    def __str__(self) -> str:
        """Print as its text."""
        return self.text

    def to_dict(self) -> SkippedTensor:
        """Return the row that reports list of a tensor left out: ``tensor`` and ``reason``."""
        return {"tensor": self.tensor, "reason": self.text}
