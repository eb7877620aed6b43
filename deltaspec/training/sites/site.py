"""One matrix of a running model that a method may change."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.types import MatrixKey, View


@dataclass(frozen=True, slots=True)
class Site:
    """One matrix of a running model that a method may change.

    ``path`` is its module's path, ``kind`` linear, conv1d (GPT-2's, weights stored as (d_in, d_out)) or embedding.
    ``key.tensor`` is the weight's name in the running model. ``shape`` is (d_out, d_in); of an embedding stored as
    (V, d) it is (V, d). ``view`` says which rows of the module's matrix are meant where it is part of a fused one;
    ``whole`` is true where all are.
    """

    path: str
    kind: str
    key: MatrixKey
    shape: tuple[int, int]
    view: View
    whole: bool = True

    @property
    def name(self) -> str:
        """Its path, and its part where it is not the whole of its module."""
        return self.path if self.whole else f"{self.path}.{self.key.part}"
