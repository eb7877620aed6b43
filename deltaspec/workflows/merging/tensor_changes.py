"""What happens to each tensor of a base, and what follows from it for tied weights and the vocabulary."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from deltaspec.architecture.match import identify
from deltaspec.errors import PairingError
from deltaspec.files.dtypes import GRIDS
from deltaspec.io.content import same_content
from deltaspec.io.running import SHARED, list_tied
from deltaspec.pairing.dense import VOCABULARY_ROLES
from deltaspec.pairing.plan import unreadable
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import Checkpoint, LowRankSource, MatrixKey, Note, NoteKind, Shape, TensorSpec, View


@dataclass(slots=True)
class Part:
    """One matrix of a tensor: where it lies in the base, and the factors added to it, their weights folded in."""

    key: MatrixKey
    view: View
    factors: list[LowRankSource] = field(default_factory=list)


@dataclass(slots=True)
class Change:
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
class Changes:
    """By tensor of the result; ``added`` are tensors that the base lacks, ``vocabulary`` its old and new size.

    ``untied`` says that a head was added to a base that uses its embedding for it: whole, or as a change of it.
    """

    tensors: dict[str, Change] = field(default_factory=dict)
    added: dict[str, TensorSpec] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    vocabulary: tuple[int, int] | None = None
    untied: bool = False

    def note(self, text: str, kind: NoteKind = NoteKind.REMARK, tensor: str = "") -> None:
        """Keep a note once."""
        if (note := Note(kind, text, tensor)) not in self.notes:
            self.notes.append(note)


def follow_ties(changes: Changes, base: Checkpoint) -> None:
    """Where the config ties head and embedding and the base stores both alike, change both alike."""
    if not any(scope.get("tie_word_embeddings") is True for scope in _scopes(base)):
        return
    known = identify({name: spec.shape for name, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    names = [
        name
        for name, found in known.matrices.items()
        if len(found) == 1 and found[0].key.role in VOCABULARY_ROLES and base.tensors[name].dtype in GRIDS
    ]
    for name in names:
        change = changes.tensors.get(name)
        for other in names:
            spec, mine = base.tensors[other], base.tensors[name]
            if change is None or other in changes.tensors or (spec.shape, spec.dtype) != (mine.shape, mine.dtype):
                continue
            if same_content(mine, spec):
                parts = {key: replace(part) for key, part in change.parts.items()}
                changes.tensors[other] = replace(change, spec=spec, parts=parts)
                changes.note(f"'{other}' is tied to '{name}' and changes with it")


def fold_shared(changes: Changes, base: Checkpoint) -> None:
    """Where an adapter brings all modules that share T5's or BART's one stored embedding alike, replace that one."""
    readable = {name: spec.shape for name, spec in base.tensors.items() if not unreadable(spec)}
    for name in [name for name in readable if SHARED.fullmatch(name.removesuffix(".weight"))]:
        uses = list_tied(base, name.removesuffix(".weight"), {stored: stored for stored in base.tensors})
        brought = [changes.added.get(f"{path}.weight") for path, _ in uses]
        first = brought[0] if brought else None
        if first is None or name in changes.tensors:
            continue
        alike = [
            s for s in brought if s and (s.shape, s.dtype) == (first.shape, first.dtype) and same_content(s, first)
        ]
        if len(alike) == len(uses):
            (found,) = identify(readable, base.config).matrices[name]
            part = Part(found.key, found.view)
            changes.tensors[name] = Change(base.tensors[name], found.key, whole=first, parts={found.key: part})
            folded = {f"{path}.weight" for path, _ in uses}
            for brought_name in folded:
                del changes.added[brought_name]
            changes.notes = [n for n in changes.notes if n.kind is not NoteKind.ADDED or n.tensor not in folded]


def settle_heads(changes: Changes) -> None:
    """Drop an added head or head's bias that repeats what it is tied to; a head that does not is no longer tied."""
    changes.untied = any(name != change.spec.name for name, change in changes.tensors.items())
    whole = {name: c.whole for name, c in changes.tensors.items() if c.whole is not None and c.share == 1}
    for name in [name for name in changes.added if re.sub(r"bias$", "weight", name).endswith(HEAD_NAMES)]:
        spec = changes.added[name]
        alike = [other for other, w in whole.items() if (spec.shape, spec.dtype) == (w.shape, w.dtype)]
        twin = next((other for other in alike if same_content(spec, whole[other])), None)
        if twin:
            del changes.added[name]
            changes.note(f"'{name}' repeats '{twin}' and stays tied to it")
        elif name.endswith(HEAD_NAMES):
            changes.untied = True


def _scopes(base: Checkpoint) -> list[dict[str, object]]:
    return [base.config, *(scope for scope in base.config.values() if isinstance(scope, dict))]


def check_vocabulary(changes: Changes, base: Checkpoint) -> None:
    """Refuse a vocabulary that grows in one tensor and stays in another; keep its old and new size."""
    grown = {name: change for name, change in changes.tensors.items() if change.shape[:1] != change.spec.shape[:1]}
    if not grown:
        return
    sizes = {(change.spec.shape[0], change.shape[0]) for change in grown.values()}
    old, new = next(iter(sizes))
    known = identify({name: spec.shape for name, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    heads = {name for name, found in known.matrices.items() if found[0].key.role in VOCABULARY_ROLES}
    left = sorted(name for name in heads - grown.keys() if base.tensors[name].shape[0] == old)
    if len(sizes) > 1 or left:
        message = (
            f"Cannot merge: the adapter changes '{next(iter(grown))}' from {old} to {new} rows, and "
            f"'{left[0] if left else list(grown)[-1]}' does not follow; save the adapter with both."
        )
        raise PairingError(message)
    changes.vocabulary = (old, new)
