"""Tensors that an adapter's file holds whole, beside its updates: into the model's own modules, or refused."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltaspec.architecture.peft_names import PREFIX, is_saved, list_names
from deltaspec.errors import CheckpointError
from deltaspec.training.sites.model_sites import HEADS, list_sites, module_at

ROOT = "base_model."  # before a head's path where PEFT's adapter has no layers (prefix tuning)
INNER = ".base_layer.bias"  # what PEFT calls the own bias of a module that it wrapped

Places = Mapping[str, tuple[nn.Module, str]]
"""By stored name: a module of the model's own, and which of its parameters."""


def refuse_biases(model: nn.Module, config: Mapping[str, object], stored: Mapping[str, Tensor], whole: Places) -> None:
    """Refuse biases of the base that were trained beside updates which have no place for them.

    Parameters
    ----------
    model : nn.Module
    config : mapping
        Content of ``adapter_config.json``.
    stored : mapping of str to Tensor
        What the updates themselves do not take.
    whole : mapping
        Which of it is the model's own.

    Raises
    ------
    CheckpointError
        If one is of neither a head nor a module that ``modules_to_save`` lists: the base would be changed for good, and
        no ``delta()`` would know.
    """
    saved = list_names(config.get("modules_to_save"))
    heads = [module_at(model, s.path) for s in list_sites(model, split=False) if s.key.role in HEADS]
    tied = {id(bias) for head in heads if (bias := head._parameters.get("bias")) is not None}
    for key in stored:
        listed = is_saved(key, saved)
        of_head = key in whole and id(whole[key][0]._parameters[whole[key][1]]) in tied
        own = key.endswith(INNER) or (key in whole and whole[key][1] == "bias")
        if own and not listed and not of_head:
            message = (
                f"The adapter has '{key.removeprefix(PREFIX)}', a bias of its base, trained beside it (its config says "
                f"bias {config.get('bias')!r}), which only LoRA has a place for: merge it into its base with PEFT."
            )
            raise CheckpointError(message)


def put_whole(model: nn.Module, whole: Places, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the model's own modules; one that was tied to another is untied first.

    Raises
    ------
    CheckpointError
        If one has another shape; then none is copied.
    """
    for key, (module, leaf) in whole.items():
        own = module._parameters[leaf]
        if own is None or own.shape != tensors[key].shape:
            message = (
                f"The adapter's '{key}' has shape {tuple(tensors[key].shape)}, expected "
                f"{None if own is None else tuple(own.shape)}: it belongs to another model."
            )
            raise CheckpointError(message)
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    with torch.no_grad():
        for key, (module, leaf) in whole.items():
            own = module._parameters[leaf]
            assert own is not None
            if owners.count(id(own)) > 1:
                own = module._parameters[leaf] = nn.Parameter(own.clone(), requires_grad=own.requires_grad)
            own.copy_(tensors[key])
