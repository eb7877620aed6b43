"""What an adapter holds beside factors, held against the fine-tune: biases, and tensors stored whole."""

from __future__ import annotations

from typing import Any

import torch

from deltaspec.io.content import same_content
from deltaspec.io.matrix import read_tensor
from deltaspec.pairing.plan import Plan, VectorPair
from deltaspec.types import MatrixSource, TensorSpec
from deltaspec.workflows.rest import change_of


def check_rest(plan: Plan, adapted: Plan) -> list[dict[str, Any]]:
    """Compare each bias's change, rounded as it is stored, and each whole tensor with those of the fine-tune.

    Parameters
    ----------
    plan : Plan
        Base against the fine-tune.
    adapted : Plan
        Base against the adapter.

    Returns
    -------
    list of dict
        tensor, kind (bias or whole), and ``right``: whether it is exactly what the fine-tune has.
    """
    vectors = {vector.key.tensor: vector for vector in plan.vectors}
    tensors = {name: vector.tuned for name, vector in vectors.items()}
    tensors |= {p.key.tensor: p.tuned.spec for p in plan.pairs if isinstance(p.tuned, MatrixSource)}
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
