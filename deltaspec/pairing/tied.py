"""Weights that two names share: compared once, and said so."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from deltaspec.architecture.match import Identification
from deltaspec.io.content import same_content
from deltaspec.types import Checkpoint, TensorSpec

HEADS = ("lm_head", "embed")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "proj_out.weight", "output_projection.weight", "decoder.weight")


@dataclass(frozen=True, slots=True)
class Tied:
    """``reasons``: name → why it is not compared again; ``heads``: head in tuned alone → the base's embedding."""

    reasons: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)


def find_tied(base: Checkpoint, tuned: Checkpoint, mapping: dict[str, str], known: Identification) -> Tied:
    """Find heads and embeddings that are one weight, by content and not by what a config claims.

    A tensor is tied where it equals the embedding bit for bit in every model that stores it; where only the tuned
    model stores a head of its own, the base's embedding is what it was tuned from.
    """
    tied = Tied({alias: f"shares memory with '{name}'" for alias, name in base.aliases.items()})
    embeddings: dict[tuple[int, ...], str] = {}
    groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, found in known.matrices.items():
        if len(found) == 1 and found[0].key.role in HEADS:
            groups[base.tensors[name].shape].append(name)
    for shape, names in groups.items():
        names.sort(key=lambda n: (known.matrices[n][0].key.role != "embed", n not in mapping, n))
        first = names[0]
        if known.matrices[first][0].key.role == "embed":
            embeddings[shape] = first
        for name in names[1:]:
            if _same(base, first, name) and _same(tuned, mapping.get(first), mapping.get(name), missing_is_same=True):
                tied.reasons.setdefault(name, f"tied to '{first}'")
    _find_heads(base, tuned, mapping, embeddings, tied)
    return tied


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
            tied.reasons[name] = f"tied to '{embedding}'"
        else:
            tied.heads[name] = embedding


def _same(checkpoint: Checkpoint, first: str | None, second: str | None, *, missing_is_same: bool = False) -> bool:
    """Tell whether two tensors of one checkpoint hold the same values."""
    if first is None or second is None:
        return missing_is_same
    specs: tuple[TensorSpec, TensorSpec] = checkpoint.tensors[first], checkpoint.tensors[second]
    return specs[0].shape == specs[1].shape and specs[0].dtype == specs[1].dtype and same_content(*specs)
