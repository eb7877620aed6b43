"""What a training will be: options, data and the model's shapes, all checked before any weight is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.io.open import identify_source
from deltaspec.options.training import DataOptions, LoopOptions, RunOptions, TargetOptions
from deltaspec.training.data.examples import Examples, read_examples, read_split
from deltaspec.training.methods import METHODS
from deltaspec.training.methods.virtual_tokens.virtual import count_positions
from deltaspec.training.sites.attachment import Method, freeze
from deltaspec.training.sites.model_sites import base_bias, module_at
from deltaspec.training.sites.site import Site
from deltaspec.types import Checkpoint
from deltaspec.workflows.shared.meta_models import build_skeleton, describe_skeleton
from deltaspec.workflows.shared.running_models import ModelKind, choose_dtype, load_tokenizer, open_model
from deltaspec.workflows.training.count import (
    Counts,
    choose_method_sites,
    count_parameters,
    describe_left_out,
    make_options,
)

TESTED = 0.2  # of other data, where nothing is held out of the training's


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: a method with its options and targets, how data are read, the loop, and where it runs."""

    method: str = "lora"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    targets: TargetOptions = field(default_factory=TargetOptions)
    data: DataOptions = field(default_factory=DataOptions)
    forget: DataOptions | None = None  # None reads it like the data
    loop: LoopOptions = field(default_factory=LoopOptions)
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True, slots=True)
class Sets:
    """Where data are read: to train, to evaluate on (a held-out share of the first if None), to measure forgetting."""

    train: str
    held: str | None = None
    forget: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A training that can begin. ``forget`` is what a probe learns from and is tested on, or one text."""

    checkpoint: Checkpoint
    tokenizer: Any
    recipe: Recipe
    options: Any
    train: Examples
    held: Examples | None
    forget: tuple[Examples, ...]
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


def make_plan(model: str, sets: Sets, recipe: Recipe) -> Plan:
    """Read the data, and attach the method to the model without weights.

    Raises
    ------
    CheckpointError
        If the model or data cannot be read, or have nothing to learn from.
    OptionError
        If an option makes no sense for this model.
    """
    options = make_options(recipe.method, recipe.method_options)
    checkpoint, task = open_model(model), recipe.data.task
    kind = describe_skeleton(model, task=task)
    if task == "causal-lm" and not kind.packed:
        message = f"Cannot use '{model}' for --task causal-lm: {kind.cls.__name__} reads texts in both directions."
        raise CheckpointError(message)
    tokenizer = load_tokenizer(checkpoint)
    limits = _find_limits(kind)
    train, held = _read_data(sets, recipe.data, tokenizer, limits)
    forget = _read_forget(sets, recipe, tokenizer, limits)
    skeleton = build_skeleton(describe_skeleton(model, task=task, labels=len(train.names)))
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
        "data": {**asdict(recipe.data), "names": list(train.names), **_name_sets(sets, recipe, (train, held, *forget))},
        "run": asdict(recipe.run),
    }
    return Plan(checkpoint, tokenizer, recipe, options, train, held, forget, counts, identity)


def list_notes(plan: Plan, *, device: torch.device) -> Iterator[str]:
    """Say what was left out of the data and of the model, and in which dtype was measured and saved."""
    stored, used = (choose_dtype(plan.checkpoint, "auto", device=place) for place in (torch.device("meta"), device))
    if stored.itemsize < torch.float32.itemsize:
        kind = "float32" if plan.method.space == "base" else str(used).removeprefix("torch.")
        saved = ", and what is saved is in float32" if plan.full else ""
        yield f"the base is stored in less than float32: what was measured, before too, is of {kind} weights{saved}"
    for name, examples in (("train", plan.train), ("held out", plan.held), *(("forget", part) for part in plan.forget)):
        if examples and examples.cut:
            yield f"{examples.cut} of {len(examples)} texts ({name}) were cut to the length in tokens"
        if examples and examples.skipped:
            yield f"{examples.skipped} empty texts ({name}) were skipped"
    if left_out := describe_left_out(plan.counts.left_out):
        yield left_out.removesuffix(".")


def _check_merge(method: str, options: Any, model: nn.Module, sites: Sequence[Site]) -> None:
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


def _read_data(
    sets: Sets, options: DataOptions, tokenizer: Any, limits: tuple[int, int]
) -> tuple[Examples, Examples | None]:
    if sets.held is not None:
        train = read_examples(sets.train, options, tokenizer, limits=limits)
        return train, read_examples(sets.held, options, tokenizer, limits=limits, names=train.names)
    if options.holdout:
        return read_split(sets.train, options, tokenizer, limits=limits)
    return read_examples(sets.train, options, tokenizer, limits=limits), None


def _read_forget(sets: Sets, recipe: Recipe, tokenizer: Any, limits: tuple[int, int]) -> tuple[Examples, ...]:
    if sets.forget is None:
        return ()
    options = recipe.forget or recipe.data
    if options.task != recipe.data.task:
        message = f"Forgetting is measured by the task of the training ({recipe.data.task}), found {options.task}."
        raise OptionError(message)
    if options.task == "causal-lm":
        return (read_examples(sets.forget, options, tokenizer, limits=limits),)
    options = replace(options, holdout=options.holdout or TESTED)
    return read_split(sets.forget, options, tokenizer, limits=limits)


def _name_base(checkpoint: Checkpoint) -> dict[str, Any]:
    """Say which files the base is; a local one by its absolute path, so that others find it."""
    found = identify_source(checkpoint)
    place = Path(checkpoint.ref).expanduser()
    return {**found, "ref": str(place.resolve()) if place.exists() else checkpoint.ref}


def _name_sets(sets: Sets, recipe: Recipe, examples: tuple[Examples | None, ...]) -> dict[str, Any]:
    """Say where data came from, and hash what was read: token ids and classes, in their order."""
    digest = hashlib.sha256()
    for part in examples:
        for tensor in (part.ids, part.offsets, part.labels) if part else ():
            digest.update(tensor.numpy().tobytes())
        digest.update(b"\0")
    forget = asdict(recipe.forget or recipe.data) if sets.forget is not None else None
    return {"sources": asdict(sets), "forget_options": forget, "sha256": digest.hexdigest()}
