"""What an adapter does not carry: each tensor with its share of the change, and why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from deltaspec.delta import DenseDelta
from deltaspec.errors import NumericalError
from deltaspec.io.content import same_content
from deltaspec.io.matrix import read_low_rank, read_tensor
from deltaspec.io.sentence_modules import is_beside
from deltaspec.pairing.modules import grown_rows
from deltaspec.pairing.plan import VectorPair
from deltaspec.types import (
    AdapterIndex,
    Checkpoint,
    LowRankSource,
    MatrixSource,
    Note,
    NoteKind,
    TensorSpec,
    WeightPair,
)
from deltaspec.workflows.extraction.nouns import Finished, Leftover, Rest, Sources
from deltaspec.workflows.extraction.sources import BESIDE
from deltaspec.workflows.shared.non_finite import describe_non_finite, locate
from deltaspec.workflows.shared.vector_changes import change_of

CHUNK = 1 << 20
CPU = torch.device("cpu")


def measure_rest(sources: Sources, rows: Finished, *, device: torch.device) -> Rest:
    """Stream every tensor without factors once, and list those that changed.

    Parameters
    ----------
    sources : Sources
    rows : mapping
        Finished factorizations by matrix: those with no energy are unchanged.
    device : torch.device
    """
    rest = Rest()
    for module in sources.modules:
        grown = grown_rows(module.pairs[0])
        if grown:
            name = f"{module.name} (rows {grown[0]} to {grown[1] - 1})"
            reason, role = "rows that the base lacks", module.pairs[0].key.role
            rest.leftovers.append(Leftover(name, role, reason, None, kind=NoteKind.GROWN))
        if not any(rows[str(pair.key)]["energy"] for pair in module.pairs):
            rest.unchanged.append(module.name)
    homes = {str(pair.key) for module in sources.modules for pair in module.pairs}
    homes |= {module.name for module in sources.modules}
    others: defaultdict[str, list[WeightPair]] = defaultdict(list)
    for pair in sources.plan.pairs:
        if not {str(pair.key), pair.key.tensor} & homes:
            others[pair.key.tensor].append(pair)
    for name, pairs in others.items():
        reason = sources.left.get(name, "left out")
        if pairs[0].key.role == "norm":
            reason = _why_not_whole(name, _whole(pairs), reason, sources)
        add_left(rest, name, pairs, reason, device)
    for vector in sources.plan.vectors:
        _add_vector(rest, vector, sources)
    for note in sources.plan.skipped:
        _add_skipped(rest, sources, note)
    rest.leftovers = [_apart(leftover, sources) for leftover in rest.leftovers]
    return rest


def _apart(leftover: Leftover, sources: Sources) -> Leftover:
    """Keep a tensor of a module beside the model from being stored whole: PEFT would look for it in the model."""
    sides = [side for side in (sources.base, sources.tuned) if isinstance(side, Checkpoint)]
    if not any(is_beside(leftover.name, side) for side in sides):
        return leftover
    return replace(leftover, reason=BESIDE, whole=None)


def add_left(rest: Rest, name: str, pairs: Sequence[WeightPair], reason: str, device: torch.device = CPU) -> None:
    """Add one tensor, whose parts or experts are ``pairs``, with their ‖Δ‖²; dense ones are read on ``device``."""
    energy = sum(_energy(pair, device) for pair in pairs)
    if energy:
        rest.leftovers.append(Leftover(name, pairs[0].key.role, reason, energy, _whole(pairs)))
    else:
        rest.unchanged.append(name)


def _whole(pairs: Sequence[WeightPair]) -> TensorSpec | None:
    """Return the one tensor of the tuned model that holds all pairs, if there is one."""
    specs = {pair.tuned.spec for pair in pairs if isinstance(pair.tuned, MatrixSource)}
    return next(iter(specs)) if len(specs) == 1 else None


def _energy(pair: WeightPair, device: torch.device) -> float:
    if isinstance(pair.tuned, LowRankSource):
        factors = read_low_rank(pair.tuned)
        return float(((factors.lora_B.mT @ factors.lora_B) * (factors.lora_A @ factors.lora_A.mT)).sum())
    assert isinstance(pair.base, MatrixSource)
    energy = float(sum(block.square().sum() for block in DenseDelta(pair.base, pair.tuned, device=device).blocks()))
    if not math.isfinite(energy):
        raise locate(pair, str(pair.key), NumericalError("it holds NaN or infinity."))
    return energy


def _why_not_whole(name: str, whole: TensorSpec | None, reason: str, sources: Sources) -> str:
    """Say why even --extras all does not store a tensor, where it was asked for; else the reason that is given."""
    home = name.rpartition(".")[0]
    inside = next((m.path for m in sources.modules if f"{m.path}.".startswith(f"{home}.")), "")
    if sources.extras != "all":
        return reason
    if whole is None:
        return "no tensor of the tuned model is this one alone, to be stored whole"
    if whole.scale:
        return "it has scales, which only its module can read"
    return f"PEFT stores modules whole, and '{home}' has factors for '{inside}'" if inside else reason


def _add_vector(rest: Rest, vector: VectorPair, sources: Sources) -> None:
    name, energy = vector.key.tensor, float(change_of(vector).square().sum())
    if not math.isfinite(energy):
        sides = (("base", vector.base), ("tuned", vector.tuned))
        message = next((said for side, spec in sides if spec and (said := describe_non_finite(side, spec))), name)
        raise NumericalError(message)
    if not energy:
        rest.unchanged.append(name)
        return
    whole = vector.tuned if vector.scaling is None else None
    beside = any(module.path == name.removesuffix(".bias") for module in sources.modules)
    what = "a vector" if vector.key.role == "other" else f"a {vector.key.role}"
    reason = _why_not_whole(name, whole, f"{what}: --extras {'bias' if beside else 'all'}", sources)
    if sources.target != "peft":
        reason = f"{what}: {sources.target} takes factors only"
    rest.leftovers.append(Leftover(name, vector.key.role, reason, energy, whole))
    if vector.key.role == "bias" and vector.rows is None:
        rest.biases[name] = partial(change_of, vector)


def _add_skipped(rest: Rest, sources: Sources, note: Note) -> None:
    """Add a tensor without a pair, with its energy where only the options keep it out."""
    tuned, excluded = sources.tuned, sources.plan.excluded
    name, reason = note.tensor, note.text
    if name in excluded:
        base, other = excluded[name]
        alike = base.shape == other.shape and not base.scale and not other.scale
        energy = _energy_between(base, other) if alike else None
        known = (i for i in rest.leftovers if energy and i.energy == energy and i.kind is NoteKind.OPTIONS)
        twin = next(known, None)
        if twin and all(same_content(*pair) for pair in zip(excluded[twin.name], excluded[name], strict=True)):
            return  # head and embedding stored twice
        if energy != 0.0:
            rest.leftovers.append(Leftover(name, "other", reason, energy, kind=NoteKind.OPTIONS))
    elif isinstance(tuned, AdapterIndex):
        if name in tuned.full or note.kind is NoteKind.OPTIONS:
            rest.leftovers.append(Leftover(name, "other", reason, None, tuned.full.get(name)))
    elif name in tuned.tensors and name not in sources.base.tensors and note.kind is not NoteKind.TIED:
        rest.leftovers.append(Leftover(name, "other", reason, None, tuned.tensors[name]))


def _energy_between(base: TensorSpec, tuned: TensorSpec) -> float | None:
    before, after = (read_tensor(spec).reshape(-1) for spec in (base, tuned))
    spans = (slice(start, start + CHUNK) for start in range(0, before.numel(), CHUNK))
    energy = sum(float((after[span].double() - before[span].double()).square().sum()) for span in spans)
    return energy if math.isfinite(energy) else None
