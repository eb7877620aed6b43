"""What an adapter holds beside factors, held against the fine-tune: biases, and tensors stored whole."""

from __future__ import annotations

from typing import Any

import torch

from deltaspec.io.content import same_content
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_targets import Layout
from deltaspec.pairing.plan import Plan, VectorPair
from deltaspec.types import AdapterIndex, Checkpoint, MatrixSource, TensorSpec
from deltaspec.workflows.shared.vector_changes import change_of
from deltaspec.workflows.verification.match_factors import Claims

Tensors = dict[str, TensorSpec]


def check_rest(plan: Plan, adapted: Plan, tensors: Tensors) -> list[dict[str, Any]]:
    """Compare each bias's change, rounded as it is stored, and each whole tensor with those of the fine-tune.

    Parameters
    ----------
    plan : Plan
        Base against the fine-tune.
    adapted : Plan
        Base against the adapter.
    tensors : dict
        The fine-tune's, from ``list_tuned``.

    Returns
    -------
    list of dict
        tensor, kind (bias or whole), and ``right``: whether it is exactly what the fine-tune has.
    """
    vectors = {vector.key.tensor: vector for vector in plan.vectors}
    rows, seen = [], set()
    for vector in adapted.vectors:
        name = vector.key.tensor
        right = (
            _same_bias(vectors.get(name), vector) if vector.scaling is not None else _whole(tensors, vector.tuned, name)
        )
        rows.append({"tensor": name, "kind": "whole" if vector.scaling is None else "bias", "right": right})
    for pair in adapted.pairs:
        name = pair.key.tensor
        if isinstance(pair.tuned, MatrixSource) and name not in seen:
            seen.add(name)
            rows.append({"tensor": name, "kind": "whole", "right": _whole(tensors, pair.tuned.spec, name)})
    return rows


def list_tuned(plan: Plan, tuned: Checkpoint | AdapterIndex, layout: Layout) -> Tensors:
    """Map names in the base and in its running model to the fine-tune's tensors, those of tied modules too."""
    tensors = {vector.key.tensor: vector.tuned for vector in plan.vectors if vector.scaling is None}
    tensors |= {p.key.tensor: p.tuned.spec for p in plan.pairs if isinstance(p.tuned, MatrixSource)}
    for name, spec in list(tensors.items()):
        for running in _uses(name, layout):
            tensors.setdefault(running, spec)
            tensors.setdefault(layout.running.get(running, running), spec)
    return (tuned.tensors if isinstance(tuned, Checkpoint) else tuned.full) | tensors


def check_claimed(
    claims: Claims, plan: Plan, tensors: Tensors, *, layout: Layout, adapter: AdapterIndex
) -> tuple[list[dict[str, Any]], list[str]]:
    """Look for every whole tensor and bias that the report lists, also where no tensor of the base pairs with it.

    Parameters
    ----------
    claims : Claims
    plan : Plan
        Base against the fine-tune.
    tensors : dict
        The fine-tune's, from ``list_tuned``.
    layout : Layout
        Of the base.
    adapter : AdapterIndex

    Returns
    -------
    rows : list of dict
        As ``check_rest`` has them, of all that is there.
    missing : list of str
    """
    rows, missing = [], []
    for name in claims.whole:
        for running in _uses(name, layout):
            stored = adapter.full.get(running)
            known = layout.running.get(running, running)
            if stored is None:
                missing.append(known)
            else:
                rows.append({"tensor": known, "kind": "whole", "right": _whole(tensors, stored, known)})
    vectors = {vector.key.tensor: vector for vector in plan.vectors}
    for path in claims.biased:
        places = layout.place(path)
        found = [adapter.biases.get(place.name.removesuffix(".weight")) for place in places]
        missing += [f"{path}.bias"] if None in found else []
        vector = vectors.get(f"{path}.bias")
        if vector is None or None in found or len(places) == 1:
            continue
        change = torch.cat([read_tensor(spec).reshape(-1) for spec in found if spec])
        right = torch.equal(change, change_of(vector).to(change.dtype))  # the writer's scaling is 1
        rows.append({"tensor": f"{path}.bias", "kind": "bias", "right": right})
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


def _whole(tensors: dict[str, TensorSpec], stored: TensorSpec, name: str) -> bool:
    tuned = tensors.get(name)
    return (
        tuned is not None and (tuned.shape, tuned.dtype) == (stored.shape, stored.dtype) and same_content(tuned, stored)
    )
