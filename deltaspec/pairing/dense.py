"""Checkpoint against checkpoint: every tensor paired by name, or listed with the reason why not."""

from __future__ import annotations

from dataclasses import replace

from deltaspec.architecture.match import Identification, identify
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.names import align_names, natural_order
from deltaspec.pairing.plan import Plan, VectorPair, chosen, refuse_shapes, unreadable
from deltaspec.pairing.tied import find_tied
from deltaspec.types import Checkpoint, Identified, MatrixKey, MatrixSource, TensorSpec, WeightPair

VOCABULARY_ROLES = {"embed", "lm_head"}


def pair_checkpoints(base: Checkpoint, tuned: Checkpoint, options: AnalyzeOptions) -> Plan:
    """Pair two checkpoints; the plan says what is compared and why the rest is not.

    Raises
    ------
    PairingError
        If paired tensors have different shapes.
    """
    plan = Plan()
    mapping, note = align_names(base.tensors, tuned.tensors)
    if note:
        plan.notes.append(note)
    known = identify({n: spec.shape for n, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    plan.family = known.family
    left_out = _skip_early(plan, base, tuned, mapping, options)
    tied = find_tied(base, tuned, mapping, known)
    for name, reason in tied.reasons.items():
        if name not in left_out:
            plan.skip(name, reason)
            left_out.add(name)
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name in sorted((n for n in base.tensors if n in mapping and n not in left_out), key=natural_order):
        _pair_tensor(plan, known, name, (base.tensors[name], tuned.tensors[mapping[name]]), options, wrong)
    _pair_untied_heads(plan, base, tuned, tied.heads, options, wrong)
    _pair_other_layouts(plan, base, tuned, known, set(mapping.values()) | left_out | set(tied.heads))
    roles = {key.role for name, *_ in wrong for key in _keys(known, name)}
    refuse_shapes(wrong, vocabulary=bool(roles & VOCABULARY_ROLES) and options.vocab == "strict")
    for pair in plan.pairs:
        if pair.guessed:
            plan.notes.append(
                f"'{pair.key.tensor}' is in no known family: taken for {pair.key.role}, depth {pair.key.depth}"
            )
    return plan


def _keys(known: Identification, name: str) -> list[MatrixKey]:
    found = [identified.key for identified in known.matrices.get(name, ())]
    return found + ([known.vectors[name]] if name in known.vectors else [])


def _skip_early(
    plan: Plan, base: Checkpoint, tuned: Checkpoint, mapping: dict[str, str], options: AnalyzeOptions
) -> set[str]:
    """List what cannot or shall not be compared; return the base names that are settled by it."""
    settled = set()
    for name in sorted(base.tensors, key=natural_order):
        spec = base.tensors[name]
        reason = "" if chosen(name, options) else "left out by --include or --exclude"
        reason = reason or unreadable(spec)
        if not reason and name in mapping:
            reason = unreadable(tuned.tensors[mapping[name]])
        if reason:
            plan.skip(name, reason)
            settled.add(name)
    return settled


def _pair_tensor(
    plan: Plan,
    known: Identification,
    name: str,
    specs: tuple[TensorSpec, TensorSpec],
    options: AnalyzeOptions,
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Add one tensor's matrices or its vector to the plan, or its shapes to ``wrong``."""
    base, tuned = specs
    rows = None
    if base.shape != tuned.shape:
        differ_in_rows = len(base.shape) == len(tuned.shape) > 0 and base.shape[1:] == tuned.shape[1:]
        vocabulary = name in known.vectors or known.matrices[name][0].key.role in VOCABULARY_ROLES
        if options.vocab != "common" or not differ_in_rows or not vocabulary:
            wrong.append((name, base.shape, tuned.shape))
            return
        rows = min(base.shape[0], tuned.shape[0])
        plan.notes.append(
            f"'{name}': the first {rows} rows are compared, base has {base.shape[0]}, tuned {tuned.shape[0]}"
        )
    if name in known.vectors:
        plan.vectors.append(VectorPair(known.vectors[name], base, tuned, rows=rows))
        return
    for identified in known.matrices[name]:
        view = identified.view
        if rows is not None:
            view = replace(view, shape=(rows, view.shape[1]), start=0, stop=rows)
        plan.pairs.append(
            WeightPair(
                identified.key, view.shape, MatrixSource(base, view), MatrixSource(tuned, view), identified.guessed
            )
        )


def _pair_untied_heads(
    plan: Plan,
    base: Checkpoint,
    tuned: Checkpoint,
    heads: dict[str, str],
    options: AnalyzeOptions,
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Compare a head that only the tuned model stores with the embedding that serves as head in the base."""
    for head, embedding in heads.items():
        if not chosen(head, options):
            plan.skip(head, "left out by --include or --exclude")
            continue
        shape = tuned.tensors[head].shape
        known = Identification({}, {head: MatrixKey(head, role="lm_head")}, "", ())
        if len(shape) == 2:
            found = identify({head: shape}, {}).matrices[head][0]
            known.matrices[head] = (replace(found, key=replace(found.key, role="lm_head"), guessed=False),)
            known.vectors.clear()
        _pair_tensor(plan, known, head, (base.tensors[embedding], tuned.tensors[head]), options, wrong)
        plan.notes.append(f"'{head}' is stored in the tuned model alone: compared with the base's tied '{embedding}'")


def _place(identified: Identified) -> tuple[object, ...]:
    key = identified.key
    return (key.stack, key.role, key.depth, key.expert, identified.view.shape)


def _pair_other_layouts(
    plan: Plan, base: Checkpoint, tuned: Checkpoint, known: Identification, settled: set[str]
) -> None:
    """Pair what differs in layout alone (experts stacked or one by one, fused or split): one place, same shape."""
    in_base = {n: s for n, s in base.tensors.items() if n not in settled and not unreadable(s)}
    in_tuned = {n: s for n, s in tuned.tensors.items() if n not in settled and not unreadable(s)}
    paired_base: set[str] = set()
    paired_tuned: set[str] = set()
    if in_base and in_tuned:
        other = identify({name: spec.shape for name, spec in in_tuned.items()}, tuned.config or base.config)
        ours = _unique_places(known, in_base)
        theirs = _unique_places(other, in_tuned)
        for place in sorted(ours.keys() & theirs.keys(), key=lambda p: natural_order(ours[p][1].key.tensor)):
            (name, mine), (tuned_name, found) = ours[place], theirs[place]
            sources = MatrixSource(in_base[name], mine.view), MatrixSource(in_tuned[tuned_name], found.view)
            plan.pairs.append(WeightPair(mine.key, mine.view.shape, *sources, mine.guessed))
            paired_base.add(name)
            paired_tuned.add(tuned_name)
        if paired_base:
            plan.notes.append(
                f"{len(paired_base)} tensors are laid out differently in the two models and pair by their place"
            )
    for name in sorted(in_base.keys() - paired_base, key=natural_order):
        plan.skip(name, "only in the base")
    for name in sorted(in_tuned.keys() - paired_tuned, key=natural_order):
        plan.skip(name, "only in the tuned model")
    for name in sorted(tuned.tensors.keys() - in_tuned.keys() - settled, key=natural_order):
        plan.skip(name, f"only in the tuned model; {unreadable(tuned.tensors[name])}")


def _unique_places(
    known: Identification, names: dict[str, TensorSpec]
) -> dict[tuple[object, ...], tuple[str, Identified]]:
    """Map each place that exactly one matrix among ``names`` holds, and that says something, to that matrix."""
    found: dict[tuple[object, ...], list[tuple[str, Identified]]] = {}
    for name in names:
        for identified in known.matrices.get(name, ()):
            if identified.key.depth is not None and identified.key.role not in ("other", "conv"):
                found.setdefault(_place(identified), []).append((name, identified))
    return {place: rows[0] for place, rows in found.items() if len(rows) == 1}
