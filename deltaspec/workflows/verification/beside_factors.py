"""What an adapter holds beside factors, held against the fine-tune: biases, and tensors stored whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaspec.io.content import same_content
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_layout import Layout
from deltaspec.pairing.plan import VectorPair
from deltaspec.types import Checkpoint, MatrixSource, TensorSpec
from deltaspec.workflows.shared.vector_changes import change_of
from deltaspec.workflows.verification.claims import Claims
from deltaspec.workflows.verification.trio import Trio

Tensors = dict[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class CheckedTensor:
    """A tensor beside the factors, of ``kind`` bias or whole; ``right`` if it is exactly what the fine-tune has."""

    tensor: str
    kind: str
    right: bool


def check_beside(trio: Trio) -> tuple[list[CheckedTensor], list[str]]:
    """Compare each bias's change, rounded as it is stored, and each whole tensor with those of the fine-tune.

    Returns
    -------
    list of CheckedTensor
        What the adapter holds, also what no tensor of the base pairs with, where it is claimed.
    list of str
        What is claimed and not there.
    """
    tensors = _list_tuned(trio)
    rows = _check_paired(trio, tensors)
    if trio.claims is None:
        return rows, []
    known = {row.tensor for row in rows}
    whole, missing = _check_claimed_whole(trio.claims, trio, tensors)
    biases, absent = _check_claimed_biases(trio.claims, trio)
    return rows + [row for row in whole + biases if row.tensor not in known], missing + absent


def _list_tuned(trio: Trio) -> Tensors:
    """Map names in the base and in its running model to the fine-tune's tensors, those of tied modules too."""
    plan, layout, tuned = trio.changed, trio.layout, trio.tuned
    tensors = {vector.key.tensor: vector.tuned for vector in plan.vectors if vector.scaling is None}
    tensors |= {p.key.tensor: p.tuned.spec for p in plan.pairs if isinstance(p.tuned, MatrixSource)}
    for name, spec in list(tensors.items()):
        for running in _uses(name, layout):
            tensors.setdefault(running, spec)
            tensors.setdefault(layout.running.get(running, running), spec)
    return (tuned.tensors if isinstance(tuned, Checkpoint) else tuned.full) | tensors


def _check_paired(trio: Trio, tensors: Tensors) -> list[CheckedTensor]:
    """Check all that pairs with a tensor of the base."""
    vectors = {vector.key.tensor: vector for vector in trio.changed.vectors}
    rows, seen = [], set()
    for vector in trio.adapted.vectors:
        name = vector.key.tensor
        if vector.scaling is None:
            right = _is_whole(tensors, vector.tuned, name) or _is_left(trio, vector.base, vector.tuned, name)
            rows.append(CheckedTensor(name, "whole", right))
        else:
            left = trio.claims is not None and name in trio.claims.left and not bool(change_of(vector).any())
            rows.append(CheckedTensor(name, "bias", left or _same_bias(vectors.get(name), vector)))
    for pair in trio.adapted.pairs:
        name = pair.key.tensor
        if isinstance(pair.tuned, MatrixSource) and name not in seen:
            seen.add(name)
            base = pair.base.spec if isinstance(pair.base, MatrixSource) else None
            right = _is_whole(tensors, pair.tuned.spec, name) or _is_left(trio, base, pair.tuned.spec, name)
            rows.append(CheckedTensor(name, "whole", right))
    return rows


def _is_left(trio: Trio, base: TensorSpec | None, stored: TensorSpec, name: str) -> bool:
    """Tell whether a tensor is the base's, stored whole with its module, and said not to be carried."""
    if base is None or trio.claims is None or name not in trio.claims.left:
        return False
    return (base.shape, base.dtype) == (stored.shape, stored.dtype) and same_content(base, stored)


def _check_claimed_whole(claims: Claims, trio: Trio, tensors: Tensors) -> tuple[list[CheckedTensor], list[str]]:
    """Look for every whole tensor that the report lists; return also those that are missing."""
    rows, missing = [], []
    for name in claims.whole:
        for running in _uses(name, trio.layout):
            stored = trio.adapter.full.get(running)
            known = trio.layout.running.get(running, running)
            if stored is None:
                missing.append(known)
            else:
                rows.append(CheckedTensor(known, "whole", _is_whole(tensors, stored, known)))
    return rows, missing


def _check_claimed_biases(claims: Claims, trio: Trio) -> tuple[list[CheckedTensor], list[str]]:
    """Look for every bias that the report lists; of one that lies in several modules, join them and compare."""
    rows, missing = [], []
    vectors = {vector.key.tensor: vector for vector in trio.changed.vectors}
    for path in claims.biased:
        places = trio.layout.place(path)
        found = [trio.adapter.biases.get(place.name.removesuffix(".weight")) for place in places]
        missing += [f"{path}.bias"] if None in found else []
        vector = vectors.get(f"{path}.bias")
        if vector is None or None in found or len(places) == 1:
            continue
        change = torch.cat([read_tensor(spec).reshape(-1) for spec in found if spec])
        right = torch.equal(change, change_of(vector).to(change.dtype))  # the writer's scaling is 1
        rows.append(CheckedTensor(f"{path}.bias", "bias", right))
    return rows, missing


def _uses(name: str, layout: Layout) -> list[str]:
    """Name the parameters of the running model that a stored tensor is: its own, and those that are tied to it."""
    found = []
    for place in layout.place(name):
        path = place.name.removesuffix(".weight")
        found += [place.name if holder == path else f"{holder}.weight" for holder in layout.holders(path)]
    return found


def _same_bias(tuned: VectorPair | None, stored: VectorPair) -> bool:
    change = change_of(stored)
    if tuned is None or tuned.base is None:
        return not bool(change.any())
    wanted, dtype = change_of(tuned), read_tensor(stored.tuned).dtype
    return change.shape == wanted.shape and torch.equal(change, wanted.to(dtype).double())


def _is_whole(tensors: Tensors, stored: TensorSpec, name: str) -> bool:
    tuned = tensors.get(name)
    return (
        tuned is not None and (tuned.shape, tuned.dtype) == (stored.shape, stored.dtype) and same_content(tuned, stored)
    )
