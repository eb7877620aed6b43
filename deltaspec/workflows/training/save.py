"""A trained model → an adapter folder, or a whole checkpoint under the base's own names, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.architecture.outline.build import quiet_transformers
from deltaspec.files.atomic import whole_file
from deltaspec.io.quantisation_config import drop_quantisation
from deltaspec.training.data.examples import padding
from deltaspec.training.several.switching import merge_module
from deltaspec.training.sites.adapted import Adapted
from deltaspec.training.sites.model_sites import base_buffers, base_parameters
from deltaspec.workflows.shared.meta_models import build_skeleton, describe_skeleton
from deltaspec.workflows.training.plan import TrainingPlan
from deltaspec.workflows.training.prepare_model import PreparedModel
from deltaspec.workflows.training.saved_adapters import save_adapter

TASKS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
COPIED = ("generation_config.json", "chat_template.jinja")


def save_trained(folder: Path, trained: PreparedModel, plan: TrainingPlan) -> None:
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


def _save_whole(folder: Path, trained: PreparedModel, plan: TrainingPlan) -> None:
    """Write config, tokenizer and weights in float32: in a base's bfloat16, small steps would be rounded away.

    An adapter's W + ΔW are summed in float64 and rounded once.
    """
    checkpoint, names = plan.checkpoint, plan.data.train.names
    kind = describe_skeleton(checkpoint.ref, task=plan.recipe.data.task, labels=len(names))
    skeleton: Any = build_skeleton(kind)  # transformers knows by it how this model's weights are named in files
    tensors = _merge(trained.model)
    with quiet_transformers():
        skeleton.save_pretrained(folder, state_dict=tensors)
        plan.tokenizer.save_pretrained(folder)
    config = _widen(checkpoint.config)
    config["architectures"] = [type(skeleton).__name__]
    if names:
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        for place in (config, config.get("text_config")) if kind.causal else ():
            if isinstance(place, dict):
                place["pad_token_id"] = padding(plan.tokenizer)  # its classifier reads the last token but this
    with whole_file(folder / "config.json") as stream:
        stream.write(json.dumps(config, indent=2, ensure_ascii=False).encode())
    for name in COPIED:
        if (checkpoint.root / name).is_file():
            shutil.copyfile(checkpoint.root / name, folder / name)


def _merge(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors by name in float32, tied ones once, with what adapters add to them."""
    own = base_parameters(model)
    tensors: dict[str, Tensor] = {n: parameter.detach() for n, parameter in own.items()} | base_buffers(model)
    names = {id(parameter): name for name, parameter in own.items()}
    for wrapper in [module for module in model.modules() if isinstance(module, Adapted)]:
        merged = merge_module(wrapper, dtype=torch.float32)
        if merged.weight is not None:
            tensors[names[id(wrapper.weight)]] = merged.weight
        if merged.shift is not None:
            assert wrapper.bias is not None  # refused by the plan
            tensors[names[id(wrapper.bias)]] = wrapper.bias.detach() + merged.shift
    return {n: (t.float() if t.is_floating_point() else t).cpu() for n, t in tensors.items()}


def _widen(config: dict[str, Any]) -> dict[str, Any]:
    """Return a base's config for weights in float32, those of its parts too."""
    wide = {name: _widen(value) if isinstance(value, dict) else value for name, value in config.items()}
    drop_quantisation(wide)
    return wide | {name: "float32" for name in ("dtype", "torch_dtype") if name in wide}
