"""PEFT LoRA folders: factors and whole tensors → adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaspec.architecture.peft_names import NESTED, ends_in, named_alike
from deltaspec.files.atomic import write_whole
from deltaspec.files.dtypes import OPTIONS
from deltaspec.files.tensor_writer import SAVED, write_safetensors
from deltaspec.io.lay_out import lay_out
from deltaspec.io.peft_files import CONFIG, WEIGHTS
from deltaspec.io.peft_layout import Layout
from deltaspec.io.peft_targets import Target, make_targets
from deltaspec.io.peft_tensors import list_factors
from deltaspec.io.peft_whole import plan_whole
from deltaspec.types import AdapterModule, Checkpoint, Entry

VERSION = "0.21.2"  # of the PEFT whose layout this is
NO_TARGETS = "dummy-target-modules"  # what PEFT asks for where nothing but whole modules is stored


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter's two files will hold, and what of it PEFT could not: name in the base → why."""

    config: dict[str, Any]
    entries: list[Entry]
    refused: dict[str, str]


@dataclass(frozen=True, slots=True)
class PeftForm:
    """How an adapter is stored.

    ``dtype`` of the factors is fp32, bf16 or fp16; ``rslora`` scales by α/√r instead of α/r. ``untied`` are tensors
    that the embedding's factors must not serve, although the base ties them. ``loader`` holds task_type and
    auto_mapping where the base's config cannot tell them.
    """

    dtype: str
    rslora: bool = False
    untied: Collection[str] = ()
    loader: Mapping[str, Any] = field(default_factory=dict)


def write_adapter(
    folder: Path, modules: Sequence[AdapterModule], full: Sequence[Entry], *, base: Checkpoint, form: PeftForm
) -> dict[str, str]:
    """Write an adapter into an existing folder, as plan_adapter lays it out; returns what was refused, with reasons.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    plan = plan_adapter(modules, full, base=base, form=form)
    write_safetensors(folder / WEIGHTS[0], plan.entries, metadata=SAVED)
    write_whole(folder / CONFIG, json.dumps(plan.config, indent=2).encode())
    return plan.refused


def plan_adapter(
    modules: Sequence[AdapterModule], full: Sequence[Entry], *, base: Checkpoint, form: PeftForm
) -> AdapterPlan:
    """Lay out an adapter for PEFT, under the names of the running model and with a scaling of exactly 1.

    Parameters
    ----------
    modules : sequence of AdapterModule
        Under the base's names. Factors of an embedding serve every module that is tied to it.
    full : sequence of Entry
        Tensors stored whole (modules_to_save), under the base's names; what else their modules hold is taken from the
        base.
    base : Checkpoint
    form : PeftForm

    Returns
    -------
    AdapterPlan
        Every module and tensor is in it, or refused.
    """
    layout = lay_out(base, form.untied)
    targets, refused = make_targets(modules, layout)
    targets = _without_collisions(targets, layout, refused)
    bias = _settle_biases(targets, refused)
    saved, whole = plan_whole(full, layout, targets, refused)
    config = {**_config(targets, layout, saved=saved, rslora=form.rslora, bias=bias), **form.loader}
    return AdapterPlan(config, list_factors(targets, OPTIONS[form.dtype].name, bias=bias) + whole, refused)


def _config(targets: Sequence[Target], layout: Layout, *, saved: list[str], rslora: bool, bias: bool) -> dict[str, Any]:
    ranks = {target.parameter or target.path: target.module.rank for target in targets}
    counts = Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], rank), default=1)
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    paths = [target.path for target in targets if not target.parameter]
    return {
        "peft_type": "LORA",
        "peft_version": VERSION,
        **_task(layout.base.config),
        "base_model_name_or_path": _reference(layout.base),
        "revision": layout.base.revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": _alpha(common, rslora=rslora),
        "rank_pattern": others,
        "alpha_pattern": {pattern: _alpha(rank, rslora=rslora) for pattern, rank in others.items()},
        "use_rslora": rslora,
        "target_modules": paths if targets else NO_TARGETS,
        "target_parameters": [target.parameter for target in targets if target.parameter] or None,
        "exclude_modules": sorted(named_alike(paths, layout.modules)) or None,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(target.module.kind == "conv1d" for target in targets),
        "lora_bias": bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def _alpha(rank: int, *, rslora: bool) -> float:
    """Return the α that makes PEFT's scaling exactly 1."""
    return math.sqrt(rank) if rslora else rank


def _task(config: dict[str, Any]) -> dict[str, Any]:
    """Say which class loads the adapter: a task type where PEFT's wrapper for it changes nothing, else a class."""
    found = config.get("architectures")
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        return {"task_type": None}
    if re.search(r"ForCausalLM$|LMHeadModel$", found[0]) and not config.get("is_encoder_decoder"):
        return {"task_type": "CAUSAL_LM"}
    return {"task_type": None, "auto_mapping": {"base_model_class": found[0], "parent_library": "transformers"}}


def _reference(base: Checkpoint) -> str:
    """Name the base so that no relative path is taken for a hub id."""
    if Path(base.ref).expanduser().exists():
        return str(base.root.resolve())
    return base.ref.partition("@")[0]


def _without_collisions(targets: list[Target], layout: Layout, refused: dict[str, str]) -> list[Target]:
    """Leave out targets that PEFT could not tell from others, by the ends of their names or by their order."""
    parameters = {target.parameter for target in targets if target.parameter}
    hit = {name for name in layout.running if name not in parameters and ends_in(name, parameters)}
    paths = {target.path for target in targets if not target.parameter}
    excluded, shared = set(named_alike(paths, layout.modules)), Counter(target.path for target in targets)
    kept = []
    for target in targets:
        reason = ""
        if target.parameter and any(name.endswith(f".{target.parameter}") for name in hit):
            reason = "PEFT would change another parameter too, whose name ends alike"
        elif not target.parameter and ends_in(target.path, excluded):
            reason = "its name ends like that of a module which must be left out"
        elif shared[target.path] > 1 and target.parameter.rpartition(".")[2] not in NESTED:
            reason = f"'{target.path}' has several targets, whose order in PEFT is not known"
        refused.update(dict.fromkeys(target.sources if reason else (), reason))
        kept += [] if reason else [target]
    return kept


def _settle_biases(targets: list[Target], refused: dict[str, str]) -> bool:
    """Decide whether the adapter carries biases: PEFT has none beside factors of embeddings or of parameters."""
    carrying = [target for target in targets if target.module.read_bias]
    blocking = next((target for target in targets if target.parameter or target.module.kind == "embedding"), None)
    if not carrying or blocking is None:
        return bool(carrying)
    reason = f"PEFT has no lora_bias beside the factors of '{blocking.sources[0]}'"
    refused.update({f"{target.sources[0]}.bias": reason for target in carrying})
    return False
