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
from deltaspec.io.peft_layout import lay_out
from deltaspec.io.peft_targets import make_targets
from deltaspec.io.sentence_modules import is_beside
from deltaspec.options import ExtractOptions, FormOptions
from deltaspec.pairing.modules import IN_BLOCKS, group_modules, grown_rows
from deltaspec.pairing.plan import Plan
from deltaspec.types import AdapterIndex, AdapterModule, Checkpoint, LowRankSource, ModulePair, WeightPair
from deltaspec.workflows.analysis.analyze import make_plan
from deltaspec.workflows.extraction.nouns import Sources
from deltaspec.workflows.shared.vector_changes import change_of

GROWN = "its vocabulary grew: --extras all stores it whole"
BESIDE = "in a module beside the model, which adapters do not reach"
NO_BIASES = "PEFT has no biases beside factors of an embedding: --extras all stores it whole"


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
    modules = [module for module in grouped if module.name not in left]
    with_biases = options.form.extras != "none" and _biases_changed(modules, plan)
    reasons = {m.name: reason for m in modules if (reason := _why_not(m, options.form, with_biases=with_biases))}
    refused = _refused_by_peft([m for m in modules if m.name not in reasons], first, target=options.form.target)
    left |= reasons | {module.name: refused[module.path] for module in modules if module.path in refused}
    kept = tuple(module for module in modules if module.name not in left)
    if not kept:
        name, reason = next(iter(left.items()), ("nothing", "no matrix pairs"))
        message = f"No matrix of {first.ref} can get factors (for example '{name}': {reason}): change the options."
        raise PairingError(message)
    kinds = [str(source.config.get("model_type")) for source in (first, second) if isinstance(source, Checkpoint)]
    if len(set(kinds)) > 1 and "None" not in kinds:
        plan.note(f"the configs say that the base is a {kinds[0]} and the tuned model a {kinds[1]}")
    return Sources(first, second, plan, kept, left, resolve_dtype(options.form.dtype, modules), options.form.target)


def _biases_changed(modules: Sequence[ModulePair], plan: Plan) -> bool:
    names = {f"{module.path}.bias" for module in modules}
    return any(bool(change_of(vector).any()) for vector in plan.vectors if vector.key.tensor in names)


def _why_not(module: ModulePair, form: FormOptions, *, with_biases: bool) -> str:
    """Say why the options keep factors from a module; "" if they do not."""
    key = module.pairs[0].key
    in_blocks = module.kind in ("linear", "conv1d") and key.role in IN_BLOCKS and key.depth is not None
    if form.target != "peft" and not in_blocks:
        return f"{form.target} takes factors of the blocks' linear layers only"
    if form.extras == "all" and grown_rows(module.pairs[0]):
        return GROWN
    return NO_BIASES if with_biases and module.kind == "embedding" else ""


def _refused_by_peft(modules: Sequence[ModulePair], base: Checkpoint, *, target: str) -> dict[str, str]:
    """Return the paths whose factors PEFT cannot hold, or only as parameters where the target is another."""
    rows = [
        AdapterModule(m.path, m.kind, m.shape, 1, _unread, m.kernel, len(m.pairs), transposed=m.transposed)
        if m.kind == "stack"
        else AdapterModule(m.path, m.kind, m.shape, 1, _unread, m.kernel)
        for m in modules
    ]
    targets, refused = make_targets(rows, lay_out(base))
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
