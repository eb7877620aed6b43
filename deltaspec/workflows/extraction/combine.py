"""Adapters → one adapter: their sum, recompressed exactly through QR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deltaspec.architecture.peft_names import is_parameter
from deltaspec.engine.local import resolve_devices
from deltaspec.errors import OptionError, PairingError
from deltaspec.io.fingerprint import identify_source
from deltaspec.io.foreign_marks import describe_module
from deltaspec.io.lay_out import StandIn, lay_out
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.io.staging import Staging
from deltaspec.options import ExtractOptions
from deltaspec.pairing.flattened import is_flattened, resolve_flattened, take_component
from deltaspec.pairing.plan import Plan
from deltaspec.pairing.sums import Total, sum_adapters
from deltaspec.store.formats.adapter import AdapterReport, ExtractionIdentity
from deltaspec.types import AdapterIndex, Checkpoint, Step, TensorSpec, WeightedSource
from deltaspec.workflows.extraction.build_adapters import build_adapters
from deltaspec.workflows.extraction.leftovers import add_left
from deltaspec.workflows.extraction.nouns import Extraction, Finished, Leftover, Rest, Sources
from deltaspec.workflows.extraction.servers import refuse_nothing_left
from deltaspec.workflows.extraction.sources import resolve_dtype, why_left
from deltaspec.workflows.shared.workers import Workers


def combine(
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    base: str | Path | None = None,
    options: ExtractOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> dict[str, AdapterReport]:
    """Write Σ weight·scaling·B·A of one or more adapters as one adapter.

    Parameters
    ----------
    adapters : sequence of (path, weight)
        LoRA folders, or files in kohya's naming, of one base; one alone is resized.
    out : str or Path
        The new adapter's folder, written whole or not at all.
    base : str or Path, optional
        The base model, which tells what kohya's names without dots mean.
    options : ExtractOptions, optional
        Ranks and form; a rank as large as the sum of the ranks loses nothing.
    overwrite : bool
        Replace an adapter that is there.
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    dict of label → the report that is also written as ``deltaspec.json``

    Raises
    ------
    DeltaspecError
        If an adapter cannot be read, two have different shapes, or tensors stored whole do not add up.
    """
    options = options or ExtractOptions()
    if options.ranks.weighted:
        message = "--weighted needs the base's weights, which combine and resize do not read: leave it out, or extract."
        raise OptionError(message)
    devices = resolve_devices(options.analysis.device, options.analysis.workers)
    added = _open_all(adapters, base, options)
    inputs = [index.root for index in added.indexes] + ([added.named.root] if added.named else [])
    with Staging(Path(out), identity=dict(added.extraction.identity), overwrite=overwrite, inputs=inputs) as staging:
        workers = Workers(devices, options.analysis.memory, progress)
        return build_adapters(added.extraction, workers, staging, partial(_rest, added))


@dataclass(frozen=True, slots=True)
class _Sum:
    """The adapters, the base where it was named, their sum, and what is made of it."""

    indexes: list[AdapterIndex]
    named: Checkpoint | None
    total: Total
    extraction: Extraction


def _open_all(adapters: Sequence[tuple[str | Path, float]], base: str | Path | None, options: ExtractOptions) -> _Sum:
    """Open and add up all adapters; of their factors nothing is read yet."""
    named, plan = _open_base(base), Plan()
    indexes = [_open(path) for path, _ in adapters]
    indexes = [_resolve(i, named, plan) for i in take_component(indexes, options.analysis.pairing.component)]
    total = sum_adapters(indexes, [weight for _, weight in adapters])
    made: list[WeightedSource] = [
        {"weight": weight, **identify_source(i)} for i, (_, weight) in zip(indexes, adapters, strict=True)
    ]
    model = named or _base_of(indexes, total)
    for note in total.notes:
        plan.note(note)
    left = {} if options.form.target == "peft" else why_left(total.modules, lay_out(model), options.form)
    kept = tuple(module for module in total.modules if module.name not in left)
    if left and not kept:
        refuse_nothing_left(" + ".join(index.ref for index in indexes), left, options.form.target)
    dtype = resolve_dtype(options.form.dtype, total.modules)
    sources = Sources(model, indexes[0], plan, kept, left, dtype, options.form.target)
    options = replace(options, form=replace(options.form, extras="all" if options.form.target == "peft" else "none"))
    identity: ExtractionIdentity = {"base": {"ref": model.ref}, "adapters": made, "options": options.identity()}
    loader = {name: indexes[0].config.get(name) for name in ("task_type", "auto_mapping")}
    return _Sum(indexes, named, total, Extraction(sources, options, identity, loader=loader))


def _base_of(indexes: Sequence[AdapterIndex], total: Total) -> Checkpoint:
    """Stand in for the base, of which only names are needed: those of the adapters' modules."""
    index = indexes[0]
    parameters = frozenset(path for i in indexes for path in i.modules if is_parameter(path, i.config))
    tensors = {m.name: TensorSpec(m.name, index.root, m.shape, "F32") for m in total.modules}
    tensors |= {name: replace(spec, name=name) for name, spec in total.full.items()}
    path = Path(index.base_model).expanduser()
    root = path if index.base_model and path.is_dir() else index.root
    return StandIn(index.base_model, root, (), tensors, revision=index.config.get("revision"), parameters=parameters)


def _any_bias(total: Total) -> bool:
    return any(bool(_sum(terms).any()) for terms in total.biases.values())


def _rest(added: _Sum, rows: Finished) -> Rest:
    """Biases and tensors stored whole go along; a sum of nothing is refused."""
    total = added.total
    beside = added.extraction.options.form.extras != "none" and (_any_bias(total) or total.full)
    if not any(row["energy"] for row in rows.values()) and not beside:
        where = f" in all that {added.extraction.options.form.target} takes" if added.extraction.sources.left else ""
        summed = ", ".join(index.ref for index in added.indexes)
        message = f"The sum of {summed} is zero{where}: there is nothing to write."
        raise PairingError(message)
    rest = Rest()
    for module in total.modules:
        if reason := added.extraction.sources.left.get(module.name):
            add_left(rest, module.name, module.pairs, reason)
    for path, terms in total.biases.items():
        rest.biases[f"{path}.bias"] = partial(_sum, terms)
        energy = float(_sum(terms).square().sum())
        rest.leftovers.append(Leftover(f"{path}.bias", "bias", "this target carries no biases", energy))
    for name, spec in total.full.items():
        rest.leftovers.append(Leftover(name, "other", "this target carries no whole tensors", None, spec))
    kept = added.extraction.sources.modules
    rest.unchanged += [m.name for m in kept if not any(rows[str(p.key)]["energy"] for p in m.pairs)]
    return rest


def _sum(terms: list[tuple[TensorSpec, float]]) -> Tensor:
    return torch.stack([read_tensor(spec).double() * factor for spec, factor in terms]).sum(0)


def _open_base(base: str | Path | None) -> Checkpoint | None:
    source = None if base is None else open_plain(base)
    if isinstance(source, AdapterIndex):
        message = f"The base {source.ref} is an adapter: pass the model that the adapters belong to."
        raise PairingError(message)
    return source


def _open(path: str | Path) -> AdapterIndex:
    index = open_plain(path)
    if not isinstance(index, AdapterIndex):
        what = describe_module(index.tensors) or "a full checkpoint; extract one first"
        message = f"Cannot use {index.ref}: combine and resize take LoRA adapters, and it is {what}."
        raise PairingError(message)
    return index


def _resolve(index: AdapterIndex, base: Checkpoint | None, plan: Plan) -> AdapterIndex:
    """Give modules without dots in their names those of the base."""
    if base is not None:
        return replace(resolve_flattened(index, base, plan), base_model=base.ref)
    if is_flattened(index):
        first = next(iter(index.modules))
        message = f"{index.ref} names its modules without dots ('{first}'): pass --base, the model that it belongs to."
        raise PairingError(message)
    return index
