"""A plan → a model on its device with the method attached, and what it is trained by."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.engine.local import resolve_devices
from deltaspec.errors import OptionError, require
from deltaspec.options.training import RunOptions
from deltaspec.training.data.examples import padding
from deltaspec.training.sites.attachment import Attachment, Group, fill, freeze
from deltaspec.training.sites.model_sites import base_parameters, module_at
from deltaspec.types import Checkpoint
from deltaspec.types.running import Accelerator
from deltaspec.workflows.shared.meta_models import build_skeleton, describe_skeleton, list_head
from deltaspec.workflows.shared.running_models import ModelKind, Weights, choose_dtype, load_model
from deltaspec.workflows.shared.stored_weights import read_state
from deltaspec.workflows.training.count import choose_method_sites
from deltaspec.workflows.training.plan import TrainingPlan

UNNAMED = ("LABEL_0", "LABEL_1")  # classes of a config that names none
HEAD = "head/"  # before the names of a head's tensors among an attachment's


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model, the method on it, and the head that is trained beside it, by names in the model."""

    model: nn.Module
    attachment: Attachment
    head: dict[str, nn.Parameter]

    def groups(self) -> list[Group]:
        """Return what the optimiser changes."""
        beside = Group(tuple(self.head.values()))
        return [*self.attachment.groups(), *([beside] if self.head else [])]

    def state(self) -> dict[str, Tensor]:
        """Everything that training changed or needs to go on."""
        return {**self.attachment.state(), **{f"{HEAD}{name}": tensor for name, tensor in self.head.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state in."""
        heads = {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}
        fill({f"{HEAD}{name}": tensor for name, tensor in self.head.items()}, heads)
        self.attachment.load({name: tensor for name, tensor in state.items() if name not in heads})


@contextmanager
def accelerated(run: RunOptions, *, seed: int) -> Iterator[Accelerator]:
    """Give an accelerate.Accelerator; torch's random generators are seeded for this process, and restored after it.

    Raises
    ------
    OptionError
        If the device is not there, or cannot compute in this precision.
    """
    accelerate = require("accelerate", extra="train")
    rank, alone = int(os.environ.get("RANK", "0")), "LOCAL_RANK" not in os.environ
    device = resolve_devices(run.device)[0] if alone else torch.device("cpu" if run.device == "cpu" else "cuda")
    if run.precision == "fp16" and device.type == "cpu":
        message = "--precision fp16 needs a CUDA device: pass --precision bf16 or no."
        raise OptionError(message)
    if alone:
        # It keeps the first training's device and precision for the whole process, and refuses others.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    cards = [device.index or 0] if device.type == "cuda" and alone else []
    with torch.random.fork_rng(cards), torch.cuda.device(cards[0] if cards else -1):
        torch.manual_seed(seed + rank)
        yield accelerate.Accelerator(cpu=device.type == "cpu" or None, mixed_precision=run.precision)


def prepare_model(plan: TrainingPlan, *, device: torch.device) -> PreparedModel:
    """Load the base, frozen, attach the method, and copy those of the base's parameters that are trained.

    Raises
    ------
    CheckpointError
        If weights are missing that are not of a head.
    """
    recipe, checkpoint = plan.recipe, plan.checkpoint
    names = plan.data.train.names
    kind = describe_skeleton(checkpoint.ref, task=recipe.data.task, labels=len(names))
    stored = choose_dtype(checkpoint, "auto", device=device)
    dtype = torch.float32 if plan.method.space == "base" else stored
    if kind.config.pad_token_id is None and not kind.causal:
        kind.config.pad_token_id = padding(plan.tokenizer)
    if names:
        kind.config.id2label = dict(enumerate(names))
        kind.config.label2id = {name: number for number, name in enumerate(names)}
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.loop.seed)
        model, beside = _load(checkpoint, kind, names, device=device, dtype=dtype)
    for config in (model.config, model.config.get_text_config()) if names and kind.causal else ():
        config.pad_token_id = padding(plan.tokenizer)  # its classifier reads the last token that is not this
    freeze(model)
    sites = choose_method_sites(model, recipe.method, recipe.targets)
    attachment = plan.method.attach(model, sites, plan.options, name="default", seed=recipe.loop.seed)
    known = {id(parameter) for parameter in attachment.trained().values()}
    head = {name: p for name, p in base_parameters(model).items() if name in beside and id(p) not in known}
    _free_head(model, head)
    _unmap(attachment)
    if recipe.run.gradient_checkpointing:
        renamed = hasattr(model, "activation_checkpointing_enable")  # by transformers 5
        name = "activation_checkpointing" if renamed else "gradient_checkpointing"
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    return PreparedModel(model, attachment, head)


def _load(
    checkpoint: Checkpoint, kind: ModelKind, names: tuple[str, ...], *, device: torch.device, dtype: torch.dtype
) -> tuple[Any, set[str]]:
    """Load a model, and say what is trained beside any adapter: its head, and a pooler that the checkpoint lacks.

    Both are drawn where they are missing, and a head that is stored with other classes too.
    """
    skeleton = build_skeleton(describe_skeleton(checkpoint.ref, task="classification" if names else "causal-lm"))
    head = set(list_head(skeleton))
    known = [f".{name}" for name in checkpoint.tensors]
    poolers = [name for name, _ in skeleton.named_parameters() if ".pooler." in name]
    missing = {name for name in poolers if not any(stored.endswith(name[name.index(".pooler.") :]) for stored in known)}
    state, stored = read_state(checkpoint), checkpoint.config.get("id2label")
    if (tuple(stored.values()) if isinstance(stored, dict) else UNNAMED) != names:
        state = {name: tensor for name, tensor in state.items() if name not in head}
    return load_model(checkpoint, kind, Weights(state, head | missing), device=device, dtype=dtype), head | missing


def _free_head(model: nn.Module, head: dict[str, nn.Parameter]) -> None:
    """Let a head be trained, in float32 whatever the model computes in."""
    for name, parameter in head.items():
        narrow = parameter.dtype != torch.float32
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(True)  # noqa: FBT003
        if narrow:
            module_at(model, name.rpartition(".")[0]).register_forward_pre_hook(_widen)


def _widen(module: nn.Module, given: tuple[object, ...]) -> tuple[object, ...]:
    del module
    return tuple(value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in given)


def _unmap(attachment: Attachment) -> None:
    """Give trained parameters of the base memory of their own; what they were stays mapped from the file."""
    if not hasattr(attachment, "originals"):
        return
    before = {name: parameter.data for name, parameter in attachment.trained().items()}
    for parameter in attachment.trained().values():
        parameter.data = parameter.data.clone()
    attachment.originals = before.__getitem__
