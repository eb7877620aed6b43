"""What follows from changed tensors for those that are tied to them, and for the vocabulary."""

from __future__ import annotations

import re
from dataclasses import replace

from deltaspec.architecture.match import Identification, identify
from deltaspec.architecture.running_names import SHARED
from deltaspec.errors import PairingError
from deltaspec.files.dtypes import GRIDS
from deltaspec.io.content import list_tied, same_content
from deltaspec.pairing.dense import VOCABULARY_ROLES
from deltaspec.pairing.plan import unreadable
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import Checkpoint, NoteKind, TensorSpec
from deltaspec.workflows.merging.tensor_changes import Part, TensorChange, TensorChanges


def settle_ties(changes: TensorChanges, base: Checkpoint) -> None:
    """Let tied tensors change alike, leave out what only repeats another, and check that the vocabulary stays one.

    Raises
    ------
    PairingError
        If the vocabulary grows in one tensor and stays in another.
    """
    known = identify({name: spec.shape for name, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    _fold_shared(changes, base, known)
    _follow_ties(changes, base, known)
    _settle_heads(changes)
    _check_vocabulary(changes, base, known)


def _follow_ties(changes: TensorChanges, base: Checkpoint, known: Identification) -> None:
    """Where the config ties head and embedding and the base stores both alike, change both alike."""
    if not any(scope.get("tie_word_embeddings") is True for scope in _scopes(base)):
        return
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


def _scopes(base: Checkpoint) -> list[dict[str, object]]:
    return [base.config, *(scope for scope in base.config.values() if isinstance(scope, dict))]


def _fold_shared(changes: TensorChanges, base: Checkpoint, known: Identification) -> None:
    """Where an adapter brings all modules that share T5's or BART's one stored embedding alike, replace that one."""
    readable = [name for name, spec in base.tensors.items() if not unreadable(spec)]
    for name in [name for name in readable if SHARED.fullmatch(name.removesuffix(".weight"))]:
        uses = list_tied(base, name.removesuffix(".weight"), {stored: stored for stored in base.tensors})
        brought = [changes.added.get(f"{path}.weight") for path, _ in uses]
        first = brought[0] if brought else None
        if first is None or name in changes.tensors or not all(spec and _alike(spec, first) for spec in brought):
            continue
        (found,) = known.matrices[name]
        part = Part(found.key, found.view)
        changes.tensors[name] = TensorChange(base.tensors[name], found.key, whole=first, parts={found.key: part})
        folded = {f"{path}.weight" for path, _ in uses}
        for brought_name in folded:
            del changes.added[brought_name]
        changes.notes = [n for n in changes.notes if n.kind is not NoteKind.ADDED or n.tensor not in folded]


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and same_content(one, other)


def _settle_heads(changes: TensorChanges) -> None:
    """Drop an added head or head's bias that repeats what it is tied to; a head that does not is no longer tied."""
    changes.untied = any(name != change.spec.name for name, change in changes.tensors.items())
    whole = {name: c.whole for name, c in changes.tensors.items() if c.whole is not None and c.share == 1}
    for name in [name for name in changes.added if re.sub(r"bias$", "weight", name).endswith(HEAD_NAMES)]:
        spec = changes.added[name]
        twin = next((other for other, replaced in whole.items() if _alike(spec, replaced)), None)
        if twin:
            del changes.added[name]
            changes.note(f"'{name}' repeats '{twin}' and stays tied to it")
        elif name.endswith(HEAD_NAMES):
            changes.untied = True


def _check_vocabulary(changes: TensorChanges, base: Checkpoint, known: Identification) -> None:
    """Refuse a vocabulary that grows in one tensor and stays in another; keep its old and new size."""
    grown = {name: change for name, change in changes.tensors.items() if change.shape[:1] != change.spec.shape[:1]}
    if not grown:
        return
    sizes = {(change.spec.shape[0], change.shape[0]) for change in grown.values()}
    old, new = next(iter(sizes))
    heads = {name for name, found in known.matrices.items() if found[0].key.role in VOCABULARY_ROLES}
    left = sorted(name for name in heads - grown.keys() if base.tensors[name].shape[0] == old)
    if len(sizes) > 1 or left:
        message = (
            f"Cannot merge: the adapter changes '{next(iter(grown))}' from {old} to {new} rows, and "
            f"'{left[0] if left else list(grown)[-1]}' does not follow; save the adapter with both."
        )
        raise PairingError(message)
    changes.vocabulary = (old, new)
