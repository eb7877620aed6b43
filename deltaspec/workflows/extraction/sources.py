"""What an extraction starts from: both sides, and which modules of the base get factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deltaspec.errors import PairingError
from deltaspec.files.dtypes import DTYPES
from deltaspec.io.lay_out import lay_out
from deltaspec.io.peft_layout import Layout
from deltaspec.io.peft_targets import make_targets
from deltaspec.io.sentence_modules import is_beside
from deltaspec.options import ExtractOptions, FormOptions
from deltaspec.pairing.modules import group_modules, grown_rows
from deltaspec.pairing.plan import Plan
from deltaspec.types import AdapterIndex, AdapterModule, Checkpoint, LowRankSource, ModulePair, Opened, WeightPair
from deltaspec.workflows.analysis.analyze import make_plan
from deltaspec.workflows.extraction.nouns import Sources
from deltaspec.workflows.extraction.servers import refuse_modules, refuse_nothing_left
from deltaspec.workflows.shared.vector_changes import change_of

GROWN = "its vocabulary grew, so that --extras all stores it whole"
BESIDE = "in a module beside the model, which adapters do not reach"
NO_BIASES = "PEFT has no biases beside factors of an embedding or a bare parameter: --extras all stores it whole"


def open_sources(base: str | Path, tuned: str | Path, options: ExtractOptions) -> Sources:
    """Open and pair both sides, and choose the modules that get factors.

    Raises
    ------
    PairingError
        If the base is an adapter, or nothing is left to extract.
    """
    plan, first, second = make_plan(base, tuned, replace(options.analysis, spectra=("delta",)))
    if isinstance(first, AdapterIndex):
        message = f"The base {first.ref} is an adapter: pass its base model, or use deltaspec combine for two adapters."
        raise PairingError(message)
    grouped, left = group_modules(plan, first, split_fused=options.form.split_fused)
    left |= {module.name: BESIDE for module in grouped if is_beside(module.name, first)}
    layout = lay_out(first)
    modules = [_as_run(module, layout) for module in grouped if module.name not in left]
    with_biases = options.form.extras != "none" and _biases_changed(modules, plan)
    left |= why_left(modules, layout, options.form, with_biases=with_biases)
    kept = tuple(module for module in modules if module.name not in left)
    if not kept:
        if not left:
            _refuse_nothing_paired(plan, first, second)
        refuse_nothing_left(first.ref, left, options.form.target)
    kinds = [str(source.config.get("model_type")) for source in (first, second) if isinstance(source, Checkpoint)]
    if len(set(kinds)) > 1 and "None" not in kinds:
        plan.note(f"the configs say that the base is a {kinds[0]} and the tuned model a {kinds[1]}")
    dtype, form = resolve_dtype(options.form.dtype, modules), options.form
    return Sources(first, second, plan, kept, left, dtype, form.target, form.extras)


def _refuse_nothing_paired(plan: Plan, base: Checkpoint, tuned: Opened) -> None:
    name, reason = next(((note.tensor, note.text) for note in plan.skipped), ("nothing", "no matrix is in both"))
    message = (
        f"No matrix of {base.ref} pairs with one of {tuned.ref} (for example '{name}': {reason}): check that both are "
        "the same kind of model, and hold all of their weights."
    )
    raise PairingError(message)


def _biases_changed(modules: Sequence[ModulePair], plan: Plan) -> bool:
    names = {f"{module.path}.bias" for module in modules}
    return any(bool(change_of(vector).any()) for vector in plan.vectors if vector.key.tensor in names)


def _as_run(module: ModulePair, layout: Layout) -> ModulePair:
    """Take a table of vectors for an embedding, or not, as the running model does."""
    kind = layout.kind(_row(module), layout.place(module.path)[0].name)
    both = {kind, module.kind} == {"embedding", "linear"}
    return replace(module, kind=kind) if both else module


def _blocks_biases(module: ModulePair, layout: Layout) -> bool:
    """Tell whether PEFT could hold no biases at all if this module had factors, and it can be stored whole instead."""
    if module.kind == "embedding":
        return True
    place = layout.place(module.path)[0]
    storable = module.kind == "linear" and bool(layout.checked) and place.expert is None
    return storable and layout.needs_parameter(_row(module), place.name)


def why_left(
    modules: Sequence[ModulePair], layout: Layout, form: FormOptions, *, with_biases: bool = False
) -> dict[str, str]:
    """Say of which modules neither target, options nor PEFT can hold factors: tensor → why.

    Parameters
    ----------
    modules : sequence of ModulePair
    layout : Layout
        Of the base, or of what stands in for it where adapters are added.
    form : FormOptions
    with_biases : bool
        Whether changes of biases go beside the factors.
    """
    reasons = refuse_modules(modules, layout.base, form.target)
    for module in modules:
        if form.extras == "all" and grown_rows(module.pairs[0]):
            reasons.setdefault(module.name, GROWN)
        elif with_biases and _blocks_biases(module, layout):
            reasons.setdefault(module.name, NO_BIASES)
    refused = _refused_by_peft([m for m in modules if m.name not in reasons], layout, target=form.target)
    return reasons | {module.name: refused[module.path] for module in modules if module.path in refused}


def _row(module: ModulePair) -> AdapterModule:
    """Return a module as it would be written, without its factors."""
    form = module.path, module.kind, module.shape
    return AdapterModule(*form, 1, _unread, module.kernel, module.experts, transposed=module.transposed)


def _refused_by_peft(modules: Sequence[ModulePair], layout: Layout, *, target: str) -> dict[str, str]:
    """Return the paths whose factors PEFT cannot hold, or only as parameters where the target is another."""
    targets, refused = make_targets([_row(module) for module in modules], layout)
    if target != "peft":
        reason = f"{target} takes factors of plain linear layers only, and running models stack these experts"
        refused |= {source: reason for found in targets if found.parameter for source in found.sources}
    return refused


def _unread() -> tuple[Tensor, Tensor]:
    return torch.zeros(0), torch.zeros(0)


def resolve_dtype(dtype: str, modules: Sequence[ModulePair]) -> str:
    """Return the dtype of the factors: bf16, fp16 or fp32.

    Parameters
    ----------
    dtype : str
        One of these, or auto: the tuned side's most frequent one, fp32 for wider and narrower.
    modules : sequence of ModulePair
    """
    if dtype != "auto":
        return dtype
    kinds = Counter(stored_dtype(pair) for module in modules for pair in module.pairs)
    found = DTYPES.get(kinds.most_common(1)[0][0])
    return (found.option if found else "") or "fp32"


def stored_dtype(pair: WeightPair) -> str:
    """Name the dtype in which the tuned side of a pair is stored."""
    if isinstance(pair.tuned, LowRankSource):
        return pair.tuned.terms[0].lora_A.dtype if pair.tuned.terms else ""
    return pair.tuned.spec.dtype
