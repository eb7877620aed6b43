"""Adapters and their weights → what they do to each tensor of the base, together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltaspec.errors import MismatchError, PairingError
from deltaspec.io.attachment import LEFT_OUT, find_unattached
from deltaspec.io.content import same_content
from deltaspec.io.intact import refuse_partial
from deltaspec.io.lay_out import lay_out
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_layout import Layout
from deltaspec.io.sentence_modules import is_beside
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter, pair_split_biases
from deltaspec.pairing.advice import advise_base
from deltaspec.pairing.plan import Plan, VectorPair, refuse_empty, refuse_shapes
from deltaspec.types import (
    AdapterIndex,
    Checkpoint,
    LowRankSource,
    LowRankTerm,
    MatrixSource,
    Note,
    NoteKind,
    TensorSpec,
    WeightPair,
)
from deltaspec.workflows.merging.grown import in_base, with_grown_rows
from deltaspec.workflows.merging.tensor_changes import Part, TensorChange, TensorChanges
from deltaspec.workflows.merging.ties import settle_ties

BLOCK = re.compile(r"\.[0-9]+\.")


@dataclass(frozen=True, slots=True)
class _Added:
    """One adapter while it is added: its weight, how it pairs with the base, and which tensors are used already."""

    adapter: AdapterIndex
    weight: float
    plan: Plan
    used: set[TensorSpec] = field(default_factory=set)


def collect_changes(base: Checkpoint, adapters: Sequence[tuple[AdapterIndex, float]]) -> TensorChanges:
    """Pair each adapter with the base and gather what happens to each tensor.

    Parameters
    ----------
    base : Checkpoint
    adapters : sequence of (AdapterIndex, float)
        Each with its weight.

    Raises
    ------
    PairingError
        If an adapter belongs to another base, or two of them replace one tensor by different values.
    CheckpointError
        If one stores a tensor empty, or as integers, that the base has whole.
    """
    changes, layout = TensorChanges(), lay_out(base)
    if unstored := layout.list_unstored():
        more = f" and {len(unstored) - 1} more" if len(unstored) > 1 else ""
        changes.note(f"{base.ref} stores no '{unstored[0]}'{more}: {layout.checked} draws it at random on loading")
    for adapter, weight in adapters:
        refuse_partial(base, adapter)
        seen, grown = with_grown_rows(base, adapter)
        plan = _pair(seen, adapter)
        plan.pairs = in_base(plan.pairs, grown)
        plan.twins = in_base(plan.twins, grown)
        _check_attachment(changes, adapter, layout)
        _add(changes, _Added(adapter, weight, plan), base)
    settle_ties(changes, base)
    if beside := next((name for name in changes.tensors if is_beside(name, base)), None):
        message = f"Cannot merge into {base.ref}: '{beside}' is in a module beside the model, whose files are copied."
        raise PairingError(message)
    return changes


def _check_attachment(changes: TensorChanges, adapter: AdapterIndex, layout: Layout) -> None:
    """Refuse factors that do nothing while the adapter runs, and note those of which that is not certain."""
    for path, reason in find_unattached(adapter, layout).items():
        if path in adapter.modules and reason != LEFT_OUT and layout.is_read(path):
            message = (
                f"Cannot merge {adapter.ref}: its factors of '{path}' do nothing where PEFT runs it ({reason}), and a "
                "merged weight would; take them out of the adapter, and of its target_modules."
            )
            raise PairingError(message)
        changes.note(f"PEFT would not run the adapter's '{path}' as it is merged: {reason}")


def _pair(base: Checkpoint, adapter: AdapterIndex) -> Plan:
    """Pair an adapter with the base; nothing can be left out of a merge, so that other shapes end it."""
    try:
        plan = pair_adapter(base, adapter, AnalyzeOptions(vocab="common"))
        refuse_shapes(plan.heads, vocabulary=False)
    except MismatchError as error:
        message = f"{error.what} {advise_base(base, adapter)}"
        raise PairingError(message) from error
    refuse_empty(plan, base, adapter)
    return plan


def _add(changes: TensorChanges, added: _Added, base: Checkpoint) -> None:
    """Add one adapter: its factors and whole tensors, its biases, its notes, and what the base lacks."""
    plan, adapter = added.plan, added.adapter
    for pair in (*plan.pairs, *plan.twins):
        _add_pair(changes, pair, added)
    for vector in plan.vectors:
        _add_vector(changes, vector, added)
        added.used.add(vector.tuned)
    split = pair_split_biases(base, adapter)
    for vector, start in split:
        _add_vector(changes, vector, added, start=start)
    for note in plan.notes:
        if note.kind is not NoteKind.UNTOUCHED:  # here that is no news
            changes.note(str(note))
    mapped = {vector.key.tensor for vector, _ in split}
    for note in plan.skipped:
        if note.tensor not in mapped:
            _note_skipped(changes, note, adapter)
    for name, spec in adapter.full.items():
        term = adapter.modules.get(name.removesuffix(".weight"))
        if term is not None:
            _replace_beside(changes, spec, term, added)
        elif spec not in added.used and name not in base.tensors:
            _refuse_other_block(name, adapter, base)
            _add_new(changes, name, spec, adapter=adapter)


def _add_pair(changes: TensorChanges, pair: WeightPair, added: _Added) -> None:
    assert isinstance(pair.base, MatrixSource)  # the base is a checkpoint
    spec = pair.base.spec
    change = changes.tensors.setdefault(_target(pair), TensorChange(spec, pair.key))
    if isinstance(pair.tuned, MatrixSource):
        if pair.tuned.spec not in added.used:
            _replace(change, pair.tuned.spec, added)
        added.used.add(pair.tuned.spec)
        change.parts.setdefault(pair.key, Part(pair.key, pair.base.view))
        return
    part = change.parts.setdefault(pair.key, Part(pair.key, pair.base.view))
    if part.view.shape != pair.base.view.shape:
        raise _grown(change, added.adapter, "has factors for", rows=max(part.view.shape[0], pair.base.view.shape[0]))
    terms = tuple(replace(term, scaling=term.scaling * added.weight) for term in pair.tuned.terms)
    part.factors.append(replace(pair.tuned, terms=terms))
    if change.whole is not None and change.whole.shape != spec.shape and not _covers(change.whole, part):
        raise _grown(change, added.adapter, "has factors for")


def _add_vector(changes: TensorChanges, pair: VectorPair, added: _Added, *, start: int | None = None) -> None:
    """Take over a vector, or add an adapter's bias; from ``start`` on where it is of some of the base's rows."""
    if pair.base is None and pair.scaling is not None and not bool(read_tensor(pair.tuned).any()):
        return  # PEFT gives every targeted module a bias, zeros where nothing was to be learnt
    if pair.base is None or (pair.scaling is not None and start is None and pair.base.shape != pair.tuned.shape):
        found = "which the base lacks" if pair.base is None else f"whose shape in the base is {pair.base.shape}"
        message = (
            f"Cannot merge {added.adapter.ref}: it changes '{pair.key.tensor}', {found}, by shape {pair.tuned.shape}; "
            "pass the base it was trained from."
        )
        raise PairingError(message)
    change = changes.tensors.setdefault(pair.base.name, TensorChange(pair.base, pair.key))
    if pair.scaling is None:
        _replace(change, pair.tuned, added)
    else:
        change.biases.append((pair.tuned, pair.scaling * added.weight, start or 0))


def _replace(change: TensorChange, whole: TensorSpec, added: _Added) -> None:
    weight = added.weight
    if change.whole is not None:
        same = change.whole.shape == whole.shape and change.whole.dtype == whole.dtype
        if weight != 1 or change.share != 1 or not same or not same_content(change.whole, whole):
            message = (
                f"Cannot merge {added.adapter.ref} with the others: two adapters replace '{change.spec.name}' by "
                "different values; merge only one of them."
            )
            raise PairingError(message)
    change.whole, change.share = whole, weight
    partial = any(part.factors and not _covers(whole, part) for part in change.parts.values())
    if whole.shape != change.spec.shape and (weight != 1 or partial):
        raise _grown(change, added.adapter, f"has weight {weight:g} for" if weight != 1 else "has factors for")


def _covers(whole: TensorSpec, part: Part) -> bool:
    """Tell whether factors are of all rows of a replacement, and so were trained on it."""
    return part.view.shape[0] == whole.shape[0]


def _grown(change: TensorChange, adapter: AdapterIndex, what: str, *, rows: int = 0) -> PairingError:
    message = (
        f"Cannot merge {adapter.ref}: it {what} '{change.spec.name}', whose rows grow from {change.spec.shape[0]} to "
        f"{rows or change.shape[0]}; merge that adapter alone with weight 1."
    )
    return PairingError(message)


def _replace_beside(changes: TensorChanges, whole: TensorSpec, term: LowRankTerm, added: _Added) -> None:
    """Follow a weight that is saved beside its factors (PEFT saves embeddings so), where it is not the base's own."""
    pairs = added.plan.pairs
    for name in {_target(p) for p in pairs if isinstance(p.tuned, LowRankSource) and term in p.tuned.terms}:
        change = changes.tensors[name]
        alike = (whole.shape, whole.dtype) == (change.spec.shape, change.spec.dtype)
        if not alike or not same_content(whole, change.spec):
            _replace(change, whole, added)


def _target(pair: WeightPair) -> str:
    """Name the tensor of the result that a pair changes: the base's, or a head that the base does not store."""
    if pair.key.role == "lm_head" or not isinstance(pair.base, MatrixSource):
        return pair.key.tensor
    return pair.base.spec.name


def _note_skipped(changes: TensorChanges, note: Note, adapter: AdapterIndex) -> None:
    """Say what of an adapter is not merged; refuse where it could be, laid out otherwise."""
    if note.kind is NoteKind.LAYOUT:
        message = f"Cannot merge {adapter.ref}: '{note.tensor}' is {note}."
        raise PairingError(message)
    if note.tensor not in adapter.full:
        changes.note(f"'{note.tensor}' is left out: {note}")


def _refuse_other_block(name: str, adapter: AdapterIndex, base: Checkpoint) -> None:
    """Refuse a tensor of a block that the model does not have; a head may be new."""
    layout = lay_out(base)
    if BLOCK.search(name) and layout.lacks(name):
        message = (
            f"Cannot merge {adapter.ref}: it brings '{name}', which {layout.checked} does not have. "
            f"{advise_base(base, adapter)}"
        )
        raise PairingError(message)


def _add_new(changes: TensorChanges, name: str, spec: TensorSpec, *, adapter: AdapterIndex) -> None:
    """Take over a tensor that the base lacks, a head mostly; it is taken whole, whatever the weight."""
    other = changes.added.setdefault(name, spec)
    if (other.shape, other.dtype) != (spec.shape, spec.dtype) or not same_content(other, spec):
        message = (
            f"Cannot merge {adapter.ref} with the others: two adapters bring '{name}', which the base lacks, with "
            "different values; merge only one of them."
        )
        raise PairingError(message)
    changes.note(f"'{name}' is not in the base and is added", NoteKind.ADDED, name)
