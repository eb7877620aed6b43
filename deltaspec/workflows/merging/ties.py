"""What follows from changed tensors for those that are tied to them, and for the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deltaspec.architecture.match import Identification, identify
from deltaspec.architecture.running_names import SHARED, outline_checkpoint
from deltaspec.errors import PairingError
from deltaspec.io.companions import untie
from deltaspec.io.content import list_tied, same_content
from deltaspec.io.lay_out import lay_out
from deltaspec.io.peft_layout import Layout
from deltaspec.pairing.plan import VOCABULARY_ROLES, unreadable
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import Checkpoint, NoteKind, TensorSpec
from deltaspec.workflows.merging.tensor_changes import Part, TensorChange, TensorChanges


def settle_ties(changes: TensorChanges, base: Checkpoint) -> None:
    """Let modules that share a weight share it still where they change alike, and part where they do not.

    Raises
    ------
    PairingError
        If modules change unlike whose weight the architecture shares whatever its config says, or the vocabulary grows
        in one tensor and stays in another.
    """
    layout = lay_out(base)
    known = identify({name: spec.shape for name, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    repeated = _fold_shared(changes, base, known) | _settle_heads(changes)
    for name in [name for name in known.matrices if layout.place(name)[0].name.endswith(".weight")]:
        _part(changes, layout, name, repeated)
    _check_vocabulary(changes, base, known)


def _part(changes: TensorChanges, layout: Layout, name: str, repeated: set[str]) -> None:
    """Give each module that uses a stored weight what its own factors make of it."""
    path = layout.place(name)[0].name.removesuffix(".weight")
    uses = layout.uses(path)
    own = changes.tensors.get(name)
    names = {use: layout.running.get(f"{use}.weight", f"{use}.weight") for use, _ in uses}
    if own is None and not any(changes.tensors.keys() & names.values()):
        return
    if own is not None and own.shape != own.spec.shape:
        return  # a vocabulary that grows: tied weights grow together
    parted = []
    for use in names:
        stored = names[use]
        change = changes.tensors.get(stored)
        if stored in repeated or (change is not None and own is not None and _changes_alike(own, change)):
            if stored not in layout.base.tensors:
                changes.tensors.pop(stored, None)
        elif change is not None or own is not None:
            parted.append(use)
            if change is None and stored not in layout.base.tensors:
                changes.added.setdefault(stored, layout.base.tensors[name])
    if parted:
        _untie(changes, layout, name, parted)


def _untie(changes: TensorChanges, layout: Layout, name: str, parted: Sequence[str]) -> None:
    """Say that head and embedding are two weights now, and store all that they shared twice."""
    base = layout.base
    if layout.tie_matters:
        message = (
            f"Cannot merge: the adapter changes '{parted[0]}' apart from '{name}', and {layout.checked} computes "
            "otherwise where its config says that they are two weights; serve the adapter unmerged."
        )
        raise PairingError(message)
    outline = outline_checkpoint({n: spec.shape for n, spec in base.tensors.items()}, untie(base.config))
    changes.untied = True
    changes.note(f"'{parted[0]}.weight' no longer shares '{name}': they change unlike")
    if isinstance(outline, str):
        return
    for use in parted:
        still = outline.tied_with(f"{use}.weight") & layout.tied_with(f"{use}.weight") - {f"{use}.weight"}
        if still:
            other = min(still).removesuffix(".weight")
            message = (
                f"Cannot merge: the adapter changes '{use}' and '{other}' unlike, which are one weight ('{name}') in "
                f"{outline.source} whatever the config says; serve the adapter unmerged."
            )
            raise PairingError(message)
    for running in outline.shapes:  # a head's bias may have been shared too
        shared = layout.tied_with(running) - {running}
        stored = next((layout.running[other] for other in sorted(shared) if other in layout.running), None)
        unstored = running not in layout.running and running not in changes.tensors
        if stored and unstored and not outline.tied_with(running) & shared:
            changes.added.setdefault(running, base.tensors[stored])


def _changes_alike(one: TensorChange, other: TensorChange) -> bool:
    if (one.whole is None) != (other.whole is None) or one.share != other.share or one.biases != other.biases:
        return False
    if one.whole is not None and other.whole is not None and not _alike(one.whole, other.whole):
        return False
    return [part.factors for part in one.parts.values()] == [part.factors for part in other.parts.values()]


def _fold_shared(changes: TensorChanges, base: Checkpoint, known: Identification) -> set[str]:
    """Where an adapter brings all modules that share T5's or BART's one stored embedding alike, replace that one.

    Returns the names that these have in the adapter.
    """
    settled: set[str] = set()
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
        settled |= folded
    return settled


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and same_content(one, other)


def _settle_heads(changes: TensorChanges) -> set[str]:
    """Drop an added head or head's bias that repeats what it is tied to, and return them; another is no longer tied."""
    repeated = set()
    whole = {name: c.whole for name, c in changes.tensors.items() if c.whole is not None and c.share == 1}
    for name in [name for name in changes.added if re.sub(r"bias$", "weight", name).endswith(HEAD_NAMES)]:
        spec = changes.added[name]
        twin = next((other for other, replaced in whole.items() if _alike(spec, replaced)), None)
        if twin:
            del changes.added[name]
            repeated.add(name)
            changes.note(f"'{name}' repeats '{twin}' and stays tied to it")
        elif name.endswith(HEAD_NAMES):
            changes.untied = True
    return repeated


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
