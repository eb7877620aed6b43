"""Adapter against its base, and adapter against adapter of one base."""

from __future__ import annotations

from dataclasses import replace

from deltaspec.architecture.match import identify
from deltaspec.architecture.roles import fused_role
from deltaspec.io.lay_out import lay_out
from deltaspec.io.peft_layout import Layout
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.advice import refuse_grown
from deltaspec.pairing.dense import pair_tensor
from deltaspec.pairing.flattened import resolve_flattened
from deltaspec.pairing.homes import Homes, factor_shape, find_homes, list_wanted, pair_factors, weight_of
from deltaspec.pairing.names import natural_order
from deltaspec.pairing.plan import Pairing, Plan, VectorPair, refuse_shapes, unreadable
from deltaspec.pairing.tied_factors import pair_tied
from deltaspec.types import (
    AdapterIndex,
    Checkpoint,
    KnownMatrix,
    LowRankSource,
    LowRankTerm,
    MatrixKey,
    NoteKind,
    Place,
    View,
    WeightPair,
)


def pair_adapter(base: Checkpoint, tuned: AdapterIndex, options: AnalyzeOptions) -> Plan:
    """Pair an adapter's factors with the base's matrices; a fused matrix gets its rows of the product.

    Names are the base's own, or those that its tensors have in the running model: experts that the base stores one by
    one pair with a stack's factors.

    Raises
    ------
    PairingError
        If the adapter targets tensors that the base lacks, or of another shape.
    """
    plan = Plan()
    tuned = resolve_flattened(tuned, base, plan)
    layout = lay_out(base)
    homes = find_homes(layout, list_wanted(tuned), plan)  # factors go before a weight saved beside them
    known = identify({n: spec.shape for n, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    plan.family = known.family
    work = Pairing(plan, known, options)
    pair_tied(plan, layout, tuned, homes, known)
    rows = [(name, place, path) for path, found in homes.items() for name, place in found]
    for name, place, path in sorted(rows, key=lambda row: (natural_order(row[0]), row[1].part)):
        if not work.leaves_out(name):
            _pair_home(work, layout, tuned, (name, place, path), homes[path])
    _pair_biases(work, base, tuned, homes)
    refuse_grown(work, base, tuned)
    work.refuse_shapes()
    for name in sorted(tuned.full.keys() - homes.keys(), key=natural_order):
        beside = name.removesuffix(".weight") in tuned.modules
        reason = "stored whole in the adapter, " + ("beside its factors" if beside else "and not in the base")
        plan.skip(name, NoteKind.WHOLE, reason)
    touched = {name for name, *_ in rows}
    untouched = sum(name not in touched for name in known.matrices)
    plan.note(
        f"{untouched} matrices of the base have no factors in the adapter: their delta is zero", NoteKind.UNTOUCHED
    )
    return plan


def _pair_home(
    work: Pairing, layout: Layout, tuned: AdapterIndex, row: tuple[str, Place, str], home: list[tuple[str, Place]]
) -> None:
    """Pair one tensor of the base, at a place in what the adapter names ``path``, with factors or a whole tensor."""
    base, (name, place, path) = layout.base, row
    if path in tuned.modules:
        pairs = pair_factors(work.known, name, term=tuned.modules[path], home=home, layout=layout)
        work.plan.pairs += pairs
        if not pairs:
            work.wrong.append((name, base.tensors[name].shape, factor_shape(tuned.modules[path])))
    elif reason := unreadable(base.tensors[name]) or unreadable(tuned.full[path]):
        work.plan.skip(name, NoteKind.UNREADABLE, reason)
    elif place.expert is not None or place.parts > 1:
        reason = "stored whole in the adapter in another layout: compare the merged checkpoints for it"
        work.plan.skip(name, NoteKind.LAYOUT, reason)
    else:
        pair_tensor(work, name, (base.tensors[name], tuned.full[path]))


def _pair_biases(work: Pairing, base: Checkpoint, tuned: AdapterIndex, homes: Homes) -> None:
    for path, bias in tuned.biases.items():
        stored, place = homes.get(path, [(weight_of(path), Place(path))])[0]
        name = f"{stored.removesuffix('.weight')}.bias"
        if work.leaves_out(name):
            continue
        if place.parts > 1:
            reason = "an adapter's bias in another layout: compare the merged checkpoints for it"
            work.plan.skip(name, NoteKind.LAYOUT, reason)
        else:
            key = work.known.vectors.get(name, MatrixKey(name, role="bias"))
            scaling = tuned.modules[path].scaling
            work.plan.vectors.append(VectorPair(key, base.tensors.get(name), bias, scaling=scaling))


def pair_split_biases(base: Checkpoint, tuned: AdapterIndex) -> list[tuple[VectorPair, int]]:
    """Pair an adapter's biases of modules that are blocks of rows of one module of the base.

    Returns
    -------
    list of (VectorPair, int)
        Each with the base's bias, if it has one, and the row at which the adapter's own begins.
    """
    found = []
    homes = find_homes(lay_out(base), list_wanted(tuned), Plan()) if tuned.biases else {}
    for path in sorted(tuned.biases.keys() & homes.keys(), key=natural_order):
        bias, (stored, place) = tuned.biases[path], homes[path][0]
        name = f"{stored.removesuffix('.weight')}.bias"
        whole = base.tensors.get(name)
        if place.parts == 1 or place.expert is not None:
            continue
        if whole is None or whole.shape == (place.parts * bias.shape[0],):
            pair = VectorPair(MatrixKey(name, role="bias"), whole, bias, scaling=tuned.modules[path].scaling)
            found.append((pair, place.part * bias.shape[0]))
    return found


def pair_adapters(base: AdapterIndex, tuned: AdapterIndex, options: AnalyzeOptions) -> Plan:
    """Pair two adapters of one base: ΔW is the second's product minus the first's, still low-rank.

    Raises
    ------
    PairingError
        If a module has different shapes in the two.
    """
    plan = Plan()
    if base.base_model != tuned.base_model:
        plan.note(f"the adapters name different bases: '{base.base_model}' and '{tuned.base_model}'")
    terms = _match_terms(base, tuned)
    shapes = {name: factor_shape(next(term for term in reversed(pair) if term)) for name, pair in terms.items()}
    known = identify(shapes, {})
    plan.family = known.family
    work = Pairing(plan, known, options)
    for name in sorted(terms, key=natural_order):
        if not work.leaves_out(name):
            _pair_terms(work, name, terms[name], shapes[name])
    for name in sorted({*base.full, *tuned.full}, key=natural_order):
        reason = "stored whole in an adapter (modules_to_save): compare the merged checkpoints for it"
        plan.skip(name, NoteKind.WHOLE, reason)
    for path in sorted({*base.biases, *tuned.biases}, key=natural_order):
        plan.skip(f"{path}.bias", NoteKind.FACTORS, "an adapter's bias: compare the merged checkpoints for it")
    return plan


Terms = tuple[LowRankTerm | None, LowRankTerm | None]


def _match_terms(base: AdapterIndex, tuned: AdapterIndex) -> dict[str, Terms]:
    """Map the tensors that either adapter changes to the factors of both; PairingError where shapes disagree."""
    terms: dict[str, Terms] = {}
    for path in {**base.modules, **tuned.modules}:
        pair = base.modules.get(path), tuned.modules.get(path)
        stacked = any(term.experts for term in pair if term)
        terms[path if stacked else weight_of(path)] = pair
    both = [(name, factor_shape(a), factor_shape(b)) for name, (a, b) in terms.items() if a and b]
    refuse_shapes([row for row in both if row[1] != row[2]], vocabulary=False)
    return terms


def _pair_terms(work: Pairing, name: str, pair: Terms, shape: tuple[int, int]) -> None:
    """Pair the factors of one tensor, expert by expert where it is a stack."""
    for side, term in zip(("first", "second"), pair, strict=True):
        if term is None:
            work.plan.note(f"'{name}' has no factors in the {side} adapter: zero there")
    first, second = pair
    found = work.known.matrices[name]
    key = replace(found[0].key, part="", role=_role(found))
    before = () if first is None else (first,)
    change = (*(() if second is None else (second,)), *(replace(term, scaling=-term.scaling) for term in before))
    experts = max(term.experts for term in pair if term)
    for expert in range(experts) if experts else (None,):
        view = View(shape, expert=expert)
        sources = LowRankSource(before, view), LowRankSource(change, view)
        own = key if expert is None else replace(key, expert=expert)
        work.plan.pairs.append(WeightPair(own, view.shape, *sources))


def _role(found: tuple[KnownMatrix, ...]) -> str:
    """Name a fused matrix's role as a whole: without the base's config its parts cannot be told apart."""
    if len(found) == 1:
        return found[0].key.role
    return fused_role((part.key.role for part in found), otherwise="qkv_proj")
