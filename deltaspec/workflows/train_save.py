"""A trained model → an adapter folder, or a whole checkpoint under the base's own names and dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.io.writer import TORCH, whole_file
from deltaspec.training.adapted import Adapted
from deltaspec.training.sites import WRAPPED, base_parameters
from deltaspec.training.switch import merge_module
from deltaspec.types import Checkpoint
from deltaspec.workflows.adapters import save_adapter
from deltaspec.workflows.models import choose_dtype, quiet_transformers
from deltaspec.workflows.skeletons import build_skeleton, describe_skeleton
from deltaspec.workflows.train_model import Trained
from deltaspec.workflows.train_plan import Plan

TASKS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
COPIED = ("generation_config.json", "chat_template.jinja")


def save_trained(folder: Path, trained: Trained, plan: Plan) -> None:
    """Write what a training has come to.

    Raises
    ------
    RunError
        If the folder cannot be written.
    """
    if plan.full:
        _save_whole(folder, trained, plan)
        return
    base, task = plan.identity["base"]["ref"], TASKS[plan.recipe.data.task]
    save_adapter(folder, trained.attachment, base=base, task_type=task, heads=trained.head)


def _save_whole(folder: Path, trained: Trained, plan: Plan) -> None:
    """Write config, tokenizer and weights; an adapter's W + ΔW are summed in float64 and rounded once."""
    checkpoint, names = plan.checkpoint, plan.train.names
    skeleton: Any = build_skeleton(
        describe_skeleton(checkpoint.ref, task=plan.recipe.data.task, labels=len(names))
    )  # without wrappers; transformers knows by it how this model's weights are named in files
    tensors = _cast(_merge(trained.model), checkpoint, prefix=f"{skeleton.base_model_prefix}.")
    with quiet_transformers():
        skeleton.save_pretrained(folder, state_dict=tensors)
        plan.tokenizer.save_pretrained(folder)
    config = {name: value for name, value in checkpoint.config.items() if name != "quantization_config"}
    config["architectures"] = [type(skeleton).__name__]
    if names:
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    with whole_file(folder / "config.json") as stream:
        stream.write(json.dumps(config, indent=2, ensure_ascii=False).encode())
    for name in COPIED:
        if (checkpoint.root / name).is_file():
            shutil.copyfile(checkpoint.root / name, folder / name)


def _merge(model: Any) -> dict[str, Tensor]:
    """Return the model's own tensors by name, tied ones once, with what adapters add to them, rounded once."""
    own = base_parameters(model)
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in own.items()}
    known = model.state_dict().keys()
    tensors |= {WRAPPED.sub("", name): tensor for name, tensor in model.named_buffers() if name in known}
    names = {id(parameter): name for name, parameter in own.items()}
    for wrapper in [module for module in model.modules() if isinstance(module, Adapted)]:
        merged = merge_module(wrapper)
        if merged.weight is not None:
            tensors[names[id(wrapper.weight)]] = merged.weight
        if merged.shift is not None:
            assert wrapper.bias is not None  # refused by the plan
            tensors[names[id(wrapper.bias)]] = wrapper.bias.detach() + merged.shift
    return tensors


def _cast(tensors: dict[str, Tensor], checkpoint: Checkpoint, *, prefix: str) -> dict[str, Tensor]:
    """Give every tensor the dtype that the base stores it in; one that it lacks gets that of most weights."""
    most = choose_dtype(checkpoint, "auto", device=torch.device("meta"))
    stored = {name.removeprefix(prefix): TORCH.get(spec.dtype, most) for name, spec in checkpoint.tensors.items()}
    return {
        name: tensor.to(kind if (kind := stored.get(name.removeprefix(prefix), most)).itemsize > 1 else most).cpu()
        for name, tensor in tensors.items()
    }
