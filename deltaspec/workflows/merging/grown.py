"""Vocabularies that grew in training: PEFT saves a resized weight whole, and the factors beside it add to that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltaspec.io.lay_out import lay_out
from deltaspec.io.matrix import open_matrix
from deltaspec.merging.apply import Rows
from deltaspec.pairing.homes import find_homes, weight_of
from deltaspec.pairing.plan import Plan
from deltaspec.types import AdapterIndex, Checkpoint, MatrixSource, TensorSpec, View, WeightPair
from deltaspec.workflows.merging.tensor_changes import TensorChange

Grown = Mapping[TensorSpec, TensorSpec]
"""What an adapter stores with more rows → the base's own."""


def with_grown_rows(base: Checkpoint, adapter: AdapterIndex) -> tuple[Checkpoint, Grown]:
    """Return the base as the adapter's factors see it: with the rows of the weights that are saved beside them."""
    tensors, grown = dict(base.tensors), {}
    beside = {path: adapter.full[weight_of(path)] for path in adapter.modules if weight_of(path) in adapter.full}
    homes = find_homes(lay_out(base), list(adapter.modules), Plan()) if beside else {}
    for path, whole in beside.items():
        for name, _ in homes.get(path, []):
            mine = base.tensors[name]
            if whole.shape[1:] == mine.shape[1:] and whole.shape[0] > mine.shape[0]:
                tensors[name], grown[whole] = whole, mine
    return (replace(base, tensors=tensors), grown) if grown else (base, grown)


def in_base(pairs: Sequence[WeightPair], grown: Grown) -> list[WeightPair]:
    """Let pairs of grown weights speak of the base's own tensors again."""
    found = []
    for pair in pairs:
        if isinstance(pair.base, MatrixSource) and pair.base.spec in grown:
            pair = replace(pair, base=replace(pair.base, spec=grown[pair.base.spec]))
        found.append(pair)
    return found


def base_rows(change: TensorChange, view: View) -> Rows:
    """Return what gives rows of a matrix as the base has them; rows that only the replacement has are that one's."""
    rows = change.spec.shape[0]
    if change.whole is None or change.whole.shape == change.spec.shape or view.shape[0] <= rows:
        return open_matrix(MatrixSource(change.spec, view)).rows
    old = open_matrix(MatrixSource(change.spec, replace(view, shape=(rows, view.shape[1]))))
    new = open_matrix(MatrixSource(change.whole, view))

    def read(start: int, stop: int) -> Tensor:
        if stop <= rows:
            return old.rows(start, stop)
        if start >= rows:
            return new.rows(start, stop)
        return torch.cat([old.rows(start, rows), new.rows(rows, stop)])

    return read
