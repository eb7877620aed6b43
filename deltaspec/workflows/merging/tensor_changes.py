"""What happens to each tensor of a base."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltaspec.types import LowRankSource, MatrixKey, Note, NoteKind, Shape, TensorSpec, View


@dataclass(slots=True)
class Part:
    """One matrix of a tensor: where it lies in the base, and the factors added to it, their weights folded in."""

    key: MatrixKey
    view: View
    factors: list[LowRankSource] = field(default_factory=list)


@dataclass(slots=True)
class TensorChange:
    """What one tensor of the base becomes.

    ``whole`` replaces it, by a ``share`` of 1 entirely; ``parts`` are its matrices that change, ``biases`` what is
    added to a vector, each with its factor and where it starts. ``key`` places a vector.
    """

    spec: TensorSpec
    key: MatrixKey
    whole: TensorSpec | None = None
    share: float = 1.0
    parts: dict[MatrixKey, Part] = field(default_factory=dict)
    biases: list[tuple[TensorSpec, float, int]] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """The shape of the result."""
        return self.spec.shape if self.whole is None else self.whole.shape


@dataclass(slots=True)
class TensorChanges:
    """What becomes of a base.

    Attributes
    ----------
    tensors : dict of TensorChange
        By name in the result.
    added : dict of TensorSpec
        Tensors that the base lacks.
    notes : list of Note
    vocabulary : (old, new), optional
        Its sizes, where it grows.
    untied : bool
        A head was added to a base that uses its embedding for it: whole, or as a change of it.
    """

    tensors: dict[str, TensorChange] = field(default_factory=dict)
    added: dict[str, TensorSpec] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    vocabulary: tuple[int, int] | None = None
    untied: bool = False

    def note(self, text: str, kind: NoteKind = NoteKind.REMARK, tensor: str = "") -> None:
        """Keep a note once."""
        if (note := Note(kind, text, tensor)) not in self.notes:
            self.notes.append(note)
