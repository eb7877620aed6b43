"""Which files a checkpoint or adapter was, as every manifest and report says it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

PlainFields = dict[str, object]
"""The fields of an options dataclass by name, as JSON has them."""


class SourceIdentity(TypedDict):
    """Which files a source was.

    ``ref`` is what was asked for, ``revision`` the hub's commit, ``files`` maps file names to fingerprints and
    ``modified`` to times of modification in ns. A live model has no ``modified``; it, and an adapter that was attached
    to its base, has ``live`` and ``method``, a live one ``method_options`` too.
    """

    ref: str
    revision: str | None
    files: dict[str, str]
    modified: NotRequired[dict[str, int]]
    live: NotRequired[bool]
    method: NotRequired[str]
    method_options: NotRequired[PlainFields]


class WeightedSource(SourceIdentity):
    """An adapter of a sum, and by how much it is multiplied."""

    weight: float


class OneSidedBlocks(TypedDict):
    """Blocks that only one side has (``base`` or ``tuned``): how many, their share of its parameters, one's path."""

    side: str
    blocks: int
    share: float
    example: str


class SkippedTensor(TypedDict):
    """A tensor that was left out, and why."""

    tensor: str
    reason: str
