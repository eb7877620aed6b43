"""Adapter against its base, and adapter against adapter of one base."""

from __future__ import annotations

from dataclasses import replace

from deltaspec.architecture.match import Identification, identify
from deltaspec.errors import PairingError
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.dense import VOCABULARY_ROLES, pair_tensor
from deltaspec.pairing.names import align_names, natural_order
from deltaspec.pairing.plan import Plan, VectorPair, chosen, refuse_shapes, unreadable
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import (
    AdapterIndex,
    Checkpoint,
    Identified,
    LowRankSource,
    LowRankTerm,
    MatrixKey,
    MatrixSource,
    TensorSpec,
    View,
    WeightPair,
)


def pair_adapter(base: Checkpoint, tuned: AdapterIndex, options: AnalyzeOptions) -> Plan:
    """Pair an adapter's factors with the base's matrices; a fused matrix gets its rows of the product.

    Raises
    ------
    PairingError
        If the adapter targets tensors that the base lacks, or of another shape.
    """
    plan = Plan()
    paths = {_weight_of(path, base): path for path in tuned.modules}
    mapping, note = align_names(base.tensors, [*paths, *tuned.full])
    if note:
        plan.notes.append(note)
    known = identify({n: spec.shape for n, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    plan.family = known.family
    for head in {*paths} - set(mapping.values()):
        embedding = _tied_embedding(head, _factor_shape(tuned.modules[paths[head]]), known)
        if embedding and embedding not in mapping:
            mapping[embedding] = head
            plan.notes.append(f"'{head}' is not stored in the base: its factors change the tied '{embedding}'")
    unknown = sorted({*paths} - set(mapping.values()), key=natural_order)
    if unknown:
        message = (
            f"The adapter {tuned.ref} targets '{unknown[0]}', which {base.ref} lacks: "
            f"pass the base it was trained from (its config says '{tuned.base_model}')."
        )
        raise PairingError(message)
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name in sorted(mapping, key=natural_order):
        if not chosen(name, options):
            plan.skip(name, "left out by --include or --exclude")
        elif mapping[name] in paths:
            _pair_factors(plan, known, base.tensors[name], tuned.modules[paths[mapping[name]]], wrong)
        elif reason := unreadable(base.tensors[name]) or unreadable(tuned.full[mapping[name]]):
            plan.skip(name, reason)
        else:
            pair_tensor(plan, known, name, (base.tensors[name], tuned.full[mapping[name]]), options, wrong)
    weights = {mapped: name for name, mapped in mapping.items()}
    for path, bias in tuned.biases.items():
        name = f"{weights.get(_weight_of(path, base), path).removesuffix('.weight')}.bias"
        if not chosen(name, options):
            plan.skip(name, "left out by --include or --exclude")
            continue
        key = known.vectors.get(name, MatrixKey(name, role="bias"))
        plan.vectors.append(VectorPair(key, base.tensors.get(name), bias, scaling=tuned.modules[path].scaling))
    roles = {part.key.role for name, *_ in wrong for part in known.matrices.get(name, ())}
    refuse_shapes(wrong, vocabulary=bool(roles & VOCABULARY_ROLES) and options.vocab == "strict")
    for name in sorted(tuned.full.keys() - set(mapping.values()), key=natural_order):
        plan.skip(name, "stored whole in the adapter, and not in the base")
    untouched = sum(name not in mapping for name in known.matrices)
    plan.notes.append(f"{untouched} matrices of the base have no factors in the adapter: their delta is zero")
    return plan


def _weight_of(path: str, base: Checkpoint | None = None) -> str:
    """Name the tensor that a module path adapts: its weight, or itself where the path already names a tensor."""
    return path if base is not None and path in base.tensors else f"{path}.weight"


def _factor_shape(term: LowRankTerm) -> tuple[int, int]:
    """(d_out, d_in) of a stored pair of factors; convolution kernels flattened."""
    a, b = term.lora_A.shape, term.lora_B.shape
    if term.embedding:
        return a[1], b[0]
    d_in = 1
    for size in a[1:]:
        d_in *= size
    return b[0], d_in


def _whole_shape(found: tuple[Identified, ...]) -> tuple[int, int]:
    """(d_out, d_in) of the whole matrix whose parts are ``found``."""
    return sum(part.view.shape[0] for part in found), found[0].view.shape[1]


def _pair_factors(
    plan: Plan,
    known: Identification,
    base: TensorSpec,
    term: LowRankTerm,
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    found = known.matrices.get(base.name, ())
    shape = _factor_shape(term)
    if not found or any(part.view.expert is not None for part in found) or _whole_shape(found) != shape:
        wrong.append((base.name, base.shape, shape))
        return
    for part in found:
        view = replace(part.view, transposed=False)
        source = LowRankSource((term,), view)
        plan.pairs.append(WeightPair(part.key, view.shape, MatrixSource(base, part.view), source, part.guessed))


def _tied_embedding(head: str, shape: tuple[int, int], known: Identification) -> str | None:
    """Name the base's embedding where ``head`` is a head that the base does not store and ties to it."""
    if not head.endswith(HEAD_NAMES):
        return None
    candidates = ((name, found[0]) for name, found in known.matrices.items() if len(found) == 1)
    return next((n for n, found in candidates if found.key.role == "embed" and found.view.shape == shape), None)


def pair_adapters(base: AdapterIndex, tuned: AdapterIndex, options: AnalyzeOptions) -> Plan:
    """Pair two adapters of one base: ΔW is the second's product minus the first's, still low-rank.

    Raises
    ------
    PairingError
        If a module has different shapes in the two.
    """
    plan = Plan()
    if base.base_model != tuned.base_model:
        plan.notes.append(f"the adapters name different bases: '{base.base_model}' and '{tuned.base_model}'")
    terms = {
        _weight_of(path): (base.modules.get(path), tuned.modules.get(path))
        for path in {**base.modules, **tuned.modules}
    }
    shapes = {name: _factor_shape(next(t for t in reversed(pair) if t)) for name, pair in terms.items()}
    known = identify(shapes, {})
    plan.family = known.family
    wrong = [
        (name, _factor_shape(a), _factor_shape(b))
        for name, (a, b) in terms.items()
        if a and b and _factor_shape(a) != _factor_shape(b)
    ]
    refuse_shapes(wrong, vocabulary=False)
    for name in sorted(terms, key=natural_order):
        if not chosen(name, options):
            plan.skip(name, "left out by --include or --exclude")
            continue
        first, second = terms[name]
        for side, term in (("first", first), ("second", second)):
            if term is None:
                plan.notes.append(f"'{name}' has no factors in the {side} adapter: zero there")
        key = replace(known.matrices[name][0].key, part="", role=_role(known.matrices[name]))
        view = View(shapes[name])
        minus = () if first is None else (replace(first, scaling=-first.scaling),)
        plus = () if second is None else (second,)
        sources = LowRankSource(() if first is None else (first,), view), LowRankSource(plus + minus, view)
        plan.pairs.append(WeightPair(key, view.shape, *sources))
    for name in sorted({*base.full, *tuned.full}, key=natural_order):
        plan.skip(name, "stored whole in an adapter (modules_to_save): compare the merged checkpoints for it")
    for path in sorted({*base.biases, *tuned.biases}, key=natural_order):
        plan.skip(f"{path}.bias", "an adapter's bias: compare the merged checkpoints for it")
    return plan


def _role(found: tuple[Identified, ...]) -> str:
    """Name a fused matrix's role as a whole: without the base's config its parts cannot be told apart."""
    roles = [part.key.role for part in found]
    if len(roles) == 1:
        return roles[0]
    return "gate_up_proj" if "gate_proj" in roles else "qkv_proj"
