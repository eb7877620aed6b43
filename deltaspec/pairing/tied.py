"""Weights that two names share: compared once, and said so."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from deltaspec.architecture.match import Identification
from deltaspec.io.content import same_content
from deltaspec.types import Checkpoint, Note, NoteKind

HEADS = ("lm_head", "embed")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "proj_out.weight", "output_projection.weight", "decoder.weight")


@dataclass(frozen=True, slots=True)
class Tied:
    """``notes``: name → of which tensor it is another name; ``heads``: head in tuned alone → the base's embedding."""

    notes: dict[str, Note] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)


def with_aliases(checkpoint: Checkpoint) -> Checkpoint:
    """List names that share memory as tensors of their own, so that the other side may hold them apart."""
    shared = {
        alias: checkpoint.tensors[name] for alias, name in checkpoint.aliases.items() if name in checkpoint.tensors
    }
    return replace(checkpoint, tensors={**checkpoint.tensors, **shared})


def find_tied(base: Checkpoint, tuned: Checkpoint, mapping: dict[str, str], known: Identification) -> Tied:
    """Find heads, embeddings and aliases that are one weight, by content and not by what a config claims.

    A tensor is tied where it equals another bit for bit in every model that stores it; where only the tuned model
    stores a head of its own, the base's embedding is what it was tuned from.

    Parameters
    ----------
    base, tuned : Checkpoint
        With aliases listed as tensors.
    mapping : dict
        Base name → tuned name.
    known : Identification
        Of the base's tensors that may be compared; others tie nothing.
    """
    tied = Tied()
    embeddings: dict[tuple[int, ...], str] = {}
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name, found in known.matrices.items():
        if len(found) == 1 and found[0].key.role in HEADS:
            groups[base.tensors[name].shape].append(name)
    for alias, name in base.aliases.items():
        if name in known.matrices and alias in known.matrices and known.matrices[name][0].key.role not in HEADS:
            groups[name] += [alias] if groups[name] else [name, alias]
    for names in groups.values():
        names.sort(key=lambda n: (known.matrices[n][0].key.role != "embed", n not in mapping, n in base.aliases, n))
        first = names[0]
        if known.matrices[first][0].key.role == "embed":
            embeddings[base.tensors[first].shape] = first
        for name in names[1:]:
            if _same(base, first, name) and _same(tuned, mapping.get(first), mapping.get(name), missing_is_same=True):
                tied.notes.setdefault(name, _note(name, first))
    _find_heads(base, tuned, mapping, embeddings, tied)
    return tied


def _note(name: str, other: str) -> Note:
    return Note(NoteKind.TIED, f"tied to '{other}'", name)


def _find_heads(
    base: Checkpoint, tuned: Checkpoint, mapping: dict[str, str], embeddings: dict[tuple[int, ...], str], tied: Tied
) -> None:
    """Settle heads that the tuned model alone stores."""
    matched = set(mapping.values())
    for name, spec in tuned.tensors.items():
        if name in matched or not name.endswith(HEAD_NAMES) or len(spec.shape) != 2:
            continue
        embedding = next((e for shape, e in embeddings.items() if shape[1:] == spec.shape[1:] and e in mapping), None)
        if embedding is None:
            continue
        if _same(tuned, mapping[embedding], name):
            tied.notes[name] = _note(name, embedding)
        else:
            tied.heads[name] = embedding


def _same(checkpoint: Checkpoint, first: str | None, second: str | None, *, missing_is_same: bool = False) -> bool:
    """Tell whether two tensors of one checkpoint hold the same values."""
    if first is None or second is None:
        return missing_is_same
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    return one == other or (one.shape == other.shape and one.dtype == other.dtype and same_content(one, other))
