"""What a training will be: options, data and the model's shapes, all checked before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.io.fingerprint import identify_source
from deltaspec.options.recipe import Recipe
from deltaspec.training.methods import METHODS
from deltaspec.training.methods.virtual_tokens.virtual import count_positions
from deltaspec.training.sites.attachment import Method, freeze
from deltaspec.training.sites.model_sites import base_bias, module_at
from deltaspec.training.sites.site import Site
from deltaspec.types import Checkpoint
from deltaspec.types.methods import MethodOptions
from deltaspec.types.running import Tokenizer
from deltaspec.workflows.shared.meta_models import build_skeleton, describe_skeleton
from deltaspec.workflows.shared.running_models import ModelKind, choose_dtype, open_model
from deltaspec.workflows.shared.tokenizer import load_tokenizer
from deltaspec.workflows.training.count import (
    Counts,
    choose_method_sites,
    count_parameters,
    describe_left_out,
    make_options,
)
from deltaspec.workflows.training.read_data import TrainingData, read_data


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A training that can begin."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    recipe: Recipe
    options: MethodOptions
    data: TrainingData
    counts: Counts
    identity: dict[str, Any]

    @property
    def method(self) -> Method:
        """Its line of METHODS."""
        return METHODS[self.recipe.method]

    @property
    def full(self) -> bool:
        """Whether whole checkpoints are saved, not adapters."""
        return self.method.space == "base" or self.recipe.run.save == "full"


def plan_training(base: str, recipe: Recipe) -> TrainingPlan:
    """Read the data, and attach the method to the model without weights.

    Raises
    ------
    CheckpointError
        If the model or data cannot be read, or have nothing to learn from.
    OptionError
        If an option makes no sense for this model, or the recipe names no data.
    """
    options = make_options(recipe.method, recipe.method_options)
    checkpoint, task = open_model(base), recipe.data.task
    kind = describe_skeleton(base, task=task)
    if task == "causal-lm" and not kind.packed:
        message = f"Cannot use '{base}' for --task causal-lm: {kind.cls.__name__} reads texts in both directions."
        raise CheckpointError(message)
    tokenizer = load_tokenizer(checkpoint)
    data = read_data(recipe, tokenizer, limits=_find_limits(kind))
    skeleton = build_skeleton(describe_skeleton(base, task=task, labels=len(data.train.names)))
    freeze(skeleton)
    sites = choose_method_sites(skeleton, recipe.method, recipe.targets)
    if recipe.run.save == "full":
        _check_merge(recipe.method, options, skeleton, sites)
    if recipe.run.gradient_checkpointing:
        _check_checkpointing(recipe.method, skeleton)
    attachment = METHODS[recipe.method].attach(skeleton, sites, options, name="default", seed=recipe.loop.seed)
    counts = count_parameters(skeleton, attachment, targets=recipe.targets)
    identity = {
        "base": _name_base(checkpoint),
        "method": recipe.method,
        "method_options": asdict(options),
        "targets": asdict(recipe.targets),
        "data": data.describe(recipe),
        "run": asdict(recipe.run),
    }
    return TrainingPlan(checkpoint, tokenizer, recipe, options, data, counts, identity)


def list_notes(plan: TrainingPlan, *, device: torch.device) -> Iterator[str]:
    """Yield what was left out of the data and of the model, and in which dtype was measured and saved, as sentences."""
    stored, used = (choose_dtype(plan.checkpoint, "auto", device=place) for place in (torch.device("meta"), device))
    if stored.itemsize < torch.float32.itemsize:
        kind = "float32" if plan.method.space == "base" else str(used).removeprefix("torch.")
        saved = ", and what is saved is in float32" if plan.full else ""
        yield f"the base is stored in less than float32: what was measured, before too, is of {kind} weights{saved}"
    data = plan.data
    for name, examples in (("train", data.train), ("held out", data.held), *(("forget", part) for part in data.forget)):
        if examples and examples.cut:
            yield f"{examples.cut} of {len(examples)} texts ({name}) were cut to the length in tokens"
        if examples and examples.skipped:
            yield f"{examples.skipped} empty texts ({name}) were skipped"
    if left_out := describe_left_out(plan.counts.left_out):
        yield left_out


def _check_merge(method: str, options: MethodOptions, model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse to merge what weights and biases cannot hold."""
    why = f"{method} makes none" if METHODS[method].space == "activation" else ""
    if getattr(options, "lora_bias", False):
        bare = [site.name for site in sites if base_bias(module_at(model, site.path), site) is None]
        why = f"'{bare[0]}' has no bias that could hold --lora-bias" if bare else ""
    if why:
        message = f"--save full merges changes of weights, and {why}: pass --save adapter."
        raise OptionError(message)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for site in sites:
        tied = [name for name in owners[id(module_at(model, site.path).weight)] if name != f"{site.path}.weight"]
        if tied:
            message = (
                f"--save full cannot merge into '{site.path}.weight', which is '{tied[0]}' as well and would change it "
                "too: pass --save adapter, or leave it out of --targets."
            )
            raise OptionError(message)


def _check_checkpointing(method: str, model: nn.Module) -> None:
    """Refuse --gradient-checkpointing where a model or method has none."""
    kind: Any = type(model)
    why = "" if kind.supports_gradient_checkpointing else f"{kind.__name__} has none"
    if method == "prefix":
        why = "--method prefix does not go with it, since transformers then keeps no keys and values"
    if why:
        message = f"--gradient-checkpointing cannot be: {why}; leave it out."
        raise OptionError(message)


def _find_limits(kind: ModelKind) -> tuple[int, int]:
    """Return the longest sequence and how many token ids; some embeddings of positions have rows that none takes."""
    longest, rows = kind.limits
    usable = count_positions(build_skeleton(kind))
    return min(filter(None, (longest, usable)), default=0), rows


def _name_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say which files the base is; a local one by its absolute path, so that others find it."""
    found = identify_source(checkpoint)
    place = Path(checkpoint.ref).expanduser()
    return {**found, "ref": str(place.resolve()) if place.exists() else checkpoint.ref}
