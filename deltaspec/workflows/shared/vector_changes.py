"""Norms and biases: their relative change, one row each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaspec.errors import DeltaspecError
from deltaspec.io.matrix import read_values
from deltaspec.pairing.plan import Plan, VectorPair
from deltaspec.store.formats.run import VectorRow
from deltaspec.store.run import Run
from deltaspec.types import MatrixKey, TensorSpec
from deltaspec.workflows.shared.non_finite import describe_non_finite


def compare_vectors(plan: Plan, run: Run) -> None:
    """Store the relative change of every norm and bias; those that hold NaN are recorded failures.

    Parameters
    ----------
    plan : Plan
    run : Run
        Skipped where a finished table without failures is there already.
    """
    failed = run.failures
    if (run.path / "vectors.json").exists() and not any(pair.key.tensor in failed for pair in plan.vectors):
        return
    rows = []
    for pair in plan.vectors:
        row, problem = _compare(pair)
        if problem:
            run.put_failure(pair.key, pair.key.tensor, problem)
        else:
            run.drop_failure(pair.key, pair.key.tensor)
        rows.append(row)
    run.put_vectors(rows)


def _read(spec: TensorSpec | None, rows: int | None) -> Tensor:
    if spec is None:
        return torch.zeros(0, dtype=torch.float64)
    return read_values(spec).to(torch.float64).reshape(-1)[:rows]


def _compare(pair: VectorPair) -> tuple[VectorRow, str]:
    """Return one row, and the sentence that says why it is empty if it is."""
    size = math.prod(pair.tuned.shape)
    try:
        base, tuned = _read(pair.base, pair.rows), _read(pair.tuned, pair.rows)
    except DeltaspecError as error:
        return _row(pair.key, size), str(error)
    for side, values, spec in (("base", base, pair.base), ("tuned", tuned, pair.tuned)):
        if spec is not None and not bool(torch.isfinite(values).all()):
            return _row(pair.key, size), describe_non_finite(side, spec)
    change = tuned * pair.scaling if pair.scaling is not None else tuned - base
    return _row(pair.key, size, (base, change)), ""


def _row(key: MatrixKey, size: int, values: tuple[Tensor, Tensor] | None = None) -> VectorRow:
    """Lay out one row; ``values`` are the base and its change, float64, where they are finite."""
    norm = relative = unchanged = None
    if values is not None:
        base, change = values
        norm = math.sqrt(float(base.square().sum()))
        relative = math.sqrt(float(change.square().sum())) / norm if norm else None
        unchanged = float((change == 0).double().mean())
    return {
        "tensor": key.tensor,
        "role": key.role,
        "depth": key.depth,
        "stack": key.stack,
        "size": size,
        "base_norm": norm,
        "relative_norm": relative,
        "unchanged_fraction": unchanged,
    }


def describe_change(key: MatrixKey, base: Tensor, tuned: Tensor) -> VectorRow:
    """Return the row of one norm or bias of a running model, (d,) before and after; None where it is not finite.

    Parameters
    ----------
    key : MatrixKey
    base, tuned : Tensor, (d,), any float dtype

    Examples
    --------
    >>> row = describe_change(MatrixKey("norm.weight", role="norm"), torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0]))
    >>> row["base_norm"], row["relative_norm"], row["unchanged_fraction"]
    (2.0, 0.5, 0.75)
    """
    before, change = base.double(), tuned.double() - base.double()
    return _row(key, base.numel(), (before, change) if bool(torch.isfinite(change).all()) else None)


def change_of(vector: VectorPair) -> torch.Tensor:
    """Return the change of a norm or bias, flat float64, in units of the weights; reads both sides.

    Parameters
    ----------
    vector : VectorPair
        Of two checkpoints, or an adapter's bias, which is itself the change once it is scaled.

    Raises
    ------
    CheckpointError
        If a side cannot be read.
    """
    tuned = read_values(vector.tuned).to(torch.float64).reshape(-1)[: vector.rows]
    if vector.scaling is not None:
        return tuned * vector.scaling
    assert vector.base is not None
    return tuned - read_values(vector.base).to(torch.float64).reshape(-1)[: vector.rows]
