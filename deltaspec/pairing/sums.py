"""Adapters of one base → one sum of low-rank terms for each module that any of them changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltaspec.architecture.match import identify
from deltaspec.architecture.roles import fused_role
from deltaspec.errors import PairingError
from deltaspec.pairing.homes import factor_shape
from deltaspec.pairing.names import natural_order
from deltaspec.types import (
    AdapterIndex,
    LowRankSource,
    LowRankTerm,
    MatrixKey,
    ModulePair,
    Shape,
    TensorSpec,
    View,
    WeightPair,
)


@dataclass(slots=True)
class Total:
    """Σ weight·adapter: modules with one term for each adapter that has factors for them.

    ``biases`` maps a module path to its stored biases with their factors; ``full`` holds tensors stored whole.
    """

    modules: tuple[ModulePair, ...] = ()
    biases: dict[str, list[tuple[TensorSpec, float]]] = field(default_factory=dict)
    full: dict[str, TensorSpec] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sum_adapters(adapters: Sequence[AdapterIndex], weights: Sequence[float]) -> Total:
    """Add adapters of one base, each times its weight; nothing is read yet.

    Raises
    ------
    PairingError
        If a module has different shapes in two adapters, or tensors stored whole would have to be added.
    """
    total = Total()
    bases = sorted({index.base_model for index in adapters})
    if len(bases) > 1:
        total.notes.append(f"the adapters name different bases: {', '.join(map(repr, bases))}")
    terms: dict[str, list[tuple[AdapterIndex, LowRankTerm]]] = {}
    for index, weight in zip(adapters, weights, strict=True):
        for path, term in index.modules.items():
            terms.setdefault(path, []).append((index, replace(term, scaling=term.scaling * weight)))
        for path, bias in index.biases.items():
            total.biases.setdefault(path, []).append((bias, index.modules[path].scaling * weight))
        if index.full and (len(adapters) > 1 or weight != 1):
            message = (
                f"{index.ref} stores '{min(index.full)}' whole: what it adds is not known without the base; "
                "merge the adapters with deltaspec merge, or extract without --extras all."
            )
            raise PairingError(message)
        total.full |= index.full
    shapes = {path: _places(found[0][1])[0] for path, found in terms.items()}
    known = identify({_tensor(path, terms[path][0][1]): shape for path, shape in shapes.items()}, {})
    modules = []
    for path in sorted(terms, key=natural_order):
        name = _tensor(path, terms[path][0][1])
        found = known.matrices.get(name, ())
        role = fused_role((part.key.role for part in found), otherwise="other")
        role = found[0].key.role if len(found) == 1 else role
        key = replace(found[0].key, role=role) if found else MatrixKey(name, role=role)
        modules.append(_module(path, terms[path], replace(key, tensor=name, part="", expert=None)))
    total.modules = tuple(modules)
    return total


def _tensor(path: str, term: LowRankTerm) -> str:
    return path if term.experts or path.endswith(".weight") else f"{path}.weight"


def _places(term: LowRankTerm) -> tuple[tuple[int, int], Shape]:
    """Return (d_out, d_in) of a term's product, of one expert in a stack, and a convolution's trailing axes."""
    trailing = term.lora_A.shape[1:]
    return factor_shape(term), trailing if len(trailing) > 1 and not term.embedding else ()


def _module(path: str, found: list[tuple[AdapterIndex, LowRankTerm]], key: MatrixKey) -> ModulePair:
    index, first = found[0]
    shape, kernel = _places(first)
    for other, term in found[1:]:
        if _places(term) != (shape, kernel) or term.experts != first.experts or term.embedding != first.embedding:
            message = (
                f"Cannot add '{path}' of {other.ref} to that of {index.ref}: shapes {_places(term)[0]} and {shape} "
                "differ; combine adapters of one base."
            )
            raise PairingError(message)
    terms = tuple(term for _, term in found)
    kind = "conv" if kernel else "conv1d" if index.config.get("fan_in_fan_out") else "linear"
    kind = "embedding" if first.embedding else "stack" if first.experts else kind
    pairs = []
    for expert in range(first.experts) if first.experts else [None]:
        view = View(shape, expert=expert)
        none = LowRankSource((), view)
        pairs.append(WeightPair(replace(key, expert=expert), shape, none, LowRankSource(terms, view)))
    return ModulePair(key.tensor, path, kind, shape, tuple(pairs), kernel, experts=first.experts)
