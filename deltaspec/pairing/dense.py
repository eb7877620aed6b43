"""Checkpoint against checkpoint: every tensor paired by name, or listed with the reason why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from deltaspec.architecture.match import Identification, identify
from deltaspec.architecture.roles import ROLES
from deltaspec.files.dtypes import GRIDS
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.match_names import match_names
from deltaspec.pairing.names import block_of, natural_order
from deltaspec.pairing.one_sided import list_one_sided
from deltaspec.pairing.plan import HEAD, VOCABULARY_ROLES, Pairing, Plan, VectorPair, is_head, unreadable
from deltaspec.pairing.tied import find_tied, with_aliases
from deltaspec.types import Checkpoint, KnownMatrix, MatrixKey, MatrixSource, NoteKind, TensorSpec, WeightPair

# Roles that tell one matrix of a block from its neighbours; a role outside the vocabulary is a name, not a place.
SAYING = ROLES.keys() - {"other", "conv"}


def pair_checkpoints(base: Checkpoint, tuned: Checkpoint, options: AnalyzeOptions) -> Plan:
    """Pair two checkpoints; the plan says what is compared and why the rest is not.

    Raises
    ------
    PairingError
        If paired tensors have different shapes.
    """
    plan, base, tuned = Plan(), with_aliases(base), with_aliases(tuned)
    mapping, note = match_names(base, tuned)
    if note:
        plan.note(note)
    known = identify({n: spec.shape for n, spec in base.tensors.items() if not unreadable(spec)}, base.config)
    plan.family = known.family
    work = Pairing(plan, known, options)
    left_out = _skip_early(work, base, tuned, mapping)
    comparable = {name: found for name, found in known.matrices.items() if name not in left_out}
    tied = find_tied(base, tuned, mapping, replace(known, matrices=comparable))
    plan.skipped += [note for name, note in tied.notes.items() if name not in left_out]
    left_out |= tied.notes.keys()
    for name in sorted((n for n in base.tensors if n in mapping and n not in left_out), key=natural_order):
        pair_tensor(work, name, (base.tensors[name], tuned.tensors[mapping[name]]))
    for head, embedding in tied.heads.items():
        _pair_untied_head(work, head, embedding, (base.tensors[embedding], tuned.tensors[head]))
    settled = left_out | set(tied.heads)
    _pair_other_layouts(plan, (base, tuned), known, mapping, settled)
    work.refuse_shapes()
    _note_coarse_bases(plan)
    _note_guesses(plan)
    plan.one_sided = list_one_sided(plan, base, tuned, options)
    return plan


def _note_guesses(plan: Plan) -> None:
    guessed = [pair.key for pair in plan.pairs if pair.guessed]
    if guessed:
        first, many = guessed[0], len(guessed) > 1
        place = "" if first.depth is None else f" of block {first.depth}"
        plan.note(
            f"{len(guessed)} of {len(plan.pairs)} matrices {'are' if many else 'is'} in no known family: taken for "
            f"what {'their modules are' if many else 'its module is'} called ("
            f"{'for example ' if many else ''}'{first.tensor}' for {first.role}{place})"
        )


def _note_coarse_bases(plan: Plan) -> None:
    """Say where a base stored more coarsely than the tuned side may itself be rounded: that is not modelled."""
    kinds: Counter[tuple[str, str]] = Counter()
    for pair in plan.pairs:
        if isinstance(pair.base, MatrixSource) and isinstance(pair.tuned, MatrixSource):
            base, tuned = pair.base.spec.dtype, pair.tuned.spec.dtype
            if GRIDS[base].mantissa < GRIDS[tuned].mantissa and not base.startswith("F8"):
                kinds[base, tuned] += 1
    for (base, tuned), count in sorted(kinds.items()):
        plan.note(
            f"{count} matrices are {base} in the base and {tuned} in the tuned model: if training began from a finer "
            f"base, the rounding to {base} is counted as change"
        )


def _skip_early(work: Pairing, base: Checkpoint, tuned: Checkpoint, mapping: dict[str, str]) -> set[str]:
    """List what cannot or shall not be compared; return the base names that are settled by it."""
    plan, settled = work.plan, set()
    for name in sorted(base.tensors, key=natural_order):
        spec = base.tensors[name]
        other = tuned.tensors.get(mapping.get(name, ""))
        reason = unreadable(spec) or (unreadable(other) if other else "")
        if work.leaves_out(name):
            if other and not reason:
                plan.excluded[name] = (spec, other)
            settled.add(name)
        elif reason:
            plan.skip(name, NoteKind.UNREADABLE, reason)
            settled.add(name)
    return settled


def pair_tensor(work: Pairing, name: str, specs: tuple[TensorSpec, TensorSpec]) -> None:
    """Add one tensor's matrices or its vector to the plan, or its shapes to the wrong ones; a head's are no mistake.

    Parameters
    ----------
    work : Pairing
    name : str
        In the base.
    specs : tuple of TensorSpec
        Of the base and of the tuned side.
    """
    base, tuned = specs
    rows = None
    if base.shape != tuned.shape:
        if is_head(work.known, name):
            work.plan.heads.append((name, base.shape, tuned.shape))
            work.plan.skip(name, NoteKind.HEAD, HEAD)
            return
        rows = _shared_rows(work, name, specs)
        if rows is None:
            work.wrong.append((name, base.shape, tuned.shape))
            return
    if name in work.known.vectors:
        work.plan.vectors.append(VectorPair(work.known.vectors[name], base, tuned, rows=rows))
        return
    for identified in work.known.matrices[name]:
        view = identified.view
        if rows is not None:
            view = replace(view, shape=(rows, view.shape[1]), start=0, stop=rows)
        sources = MatrixSource(base, view), MatrixSource(tuned, view)
        work.plan.pairs.append(WeightPair(identified.key, view.shape, *sources, identified.guessed))


def _shared_rows(work: Pairing, name: str, specs: tuple[TensorSpec, TensorSpec]) -> int | None:
    """Return how many rows two sizes of a vocabulary share, where --vocab common asks for them; None otherwise."""
    base, tuned = specs
    differ_in_rows = len(base.shape) == len(tuned.shape) > 0 and base.shape[1:] == tuned.shape[1:]
    vocabulary = {key.role for key in work.keys(name)} & (VOCABULARY_ROLES | {"bias"})
    if work.options.vocab != "common" or not differ_in_rows or not vocabulary:
        return None
    rows = min(base.shape[0], tuned.shape[0])
    work.plan.note(f"'{name}': the first {rows} rows are compared, base has {base.shape[0]}, tuned {tuned.shape[0]}")
    return rows


def _pair_untied_head(work: Pairing, head: str, embedding: str, specs: tuple[TensorSpec, TensorSpec]) -> None:
    """Compare a head that only the tuned model stores with the embedding that serves as head in the base."""
    if work.leaves_out(head):
        return
    known, shape = Identification({}, {head: MatrixKey(head, role="lm_head")}, "", ()), specs[1].shape
    if len(shape) == 2:
        found = identify({head: shape}, {}).matrices[head][0]
        found = replace(found, key=replace(found.key, role="lm_head"), guessed=False)
        known = Identification({head: (found,)}, {}, "", ())
    pair_tensor(replace(work, known=known), head, specs)
    work.plan.note(f"'{head}' is stored in the tuned model alone: compared with the base's tied '{embedding}'")


def _place(identified: KnownMatrix) -> tuple[object, ...]:
    key = identified.key
    return (key.stack, key.role, key.depth, key.expert, identified.view.shape)


def _pair_other_layouts(
    plan: Plan,
    sides: tuple[Checkpoint, Checkpoint],
    known: Identification,
    mapping: dict[str, str],
    settled: set[str],
) -> None:
    """Pair what differs in layout alone (experts stacked or one by one, fused or split): one place, same shape.

    Blocks are one where their paths are equal, or where other tensors of them pair by name.
    """
    base, tuned = sides
    ours_settled, theirs_settled = settled | set(mapping), settled | set(mapping.values())
    in_base = {n: s for n, s in base.tensors.items() if n not in ours_settled and not unreadable(s)}
    in_tuned = {n: s for n, s in tuned.tensors.items() if n not in theirs_settled and not unreadable(s)}
    blocks = {(block_of(name), block_of(other)) for name, other in mapping.items()}
    other = Identification({}, {}, "", ())
    if in_base and in_tuned:
        shapes = {name: spec.shape for name, spec in tuned.tensors.items() if not unreadable(spec)}
        other = identify(shapes, tuned.config or base.config)
    ours, theirs = _unique_places(known, in_base), _unique_places(other, in_tuned)
    shared = [place for place in ours if place in theirs and _one_block(ours[place][0], theirs[place][0], blocks)]
    shared.sort(key=lambda place: natural_order(ours[place][1].key.tensor))  # parts in order of rows
    for place in shared:
        (name, mine), (tuned_name, found) = ours[place], theirs[place]
        sources = MatrixSource(in_base[name], mine.view), MatrixSource(in_tuned[tuned_name], found.view)
        plan.pairs.append(WeightPair(mine.key, mine.view.shape, *sources, mine.guessed))
    if shared:
        plan.note(f"{len(shared)} matrices are laid out differently in the two models and pair by their place")
    _skip_rest(plan, in_base, known, {ours[place][1].key for place in shared}, "only in the base")
    _skip_rest(plan, in_tuned, other, {theirs[place][1].key for place in shared}, "only in the tuned model")
    for name in sorted(tuned.tensors.keys() - in_tuned.keys() - theirs_settled, key=natural_order):
        plan.skip(name, NoteKind.UNREADABLE, f"only in the tuned model; {unreadable(tuned.tensors[name])}")


def _one_block(base: str, tuned: str, blocks: set[tuple[str, str]]) -> bool:
    mine, other = block_of(base), block_of(tuned)
    return mine == other or (mine, other) in blocks


def _skip_rest(
    plan: Plan, tensors: dict[str, TensorSpec], known: Identification, paired: set[MatrixKey], reason: str
) -> None:
    """List tensors that did not pair; of those that paired in part, the matrices that did not."""
    for name in sorted(tensors, key=natural_order):
        keys = [found.key for found in known.matrices.get(name, ())]
        alone = [key for key in keys if key not in paired]
        for label in [str(key) for key in alone] if len(alone) < len(keys) else [name]:
            plan.skip(label, NoteKind.ONE_SIDED, reason)


def _unique_places(
    known: Identification, names: dict[str, TensorSpec]
) -> dict[tuple[object, ...], tuple[str, KnownMatrix]]:
    """Map each place that exactly one matrix among ``names`` holds, and that says something, to that matrix."""
    found: dict[tuple[object, ...], list[tuple[str, KnownMatrix]]] = {}
    for name in names:
        for identified in known.matrices.get(name, ()):
            if identified.key.depth is not None and identified.key.role in SAYING:
                found.setdefault(_place(identified), []).append((name, identified))
    return {place: rows[0] for place, rows in found.items() if len(rows) == 1}
