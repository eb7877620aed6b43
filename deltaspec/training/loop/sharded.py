"""Parameters that FSDP has sharded over processes → whole tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def link_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return under which name of the model each tensor of a state is found; FSDP puts others in their place.

    Parameters
    ----------
    model : nn.Module
        Not sharded yet.
    state : mapping of str to Tensor
        Parameters and buffers of the model; what is neither is left out.
    """
    names = {id(tensor): name for name, tensor in _list_tensors(model).items()}
    return {name: names[id(tensor)] for name, tensor in state.items() if id(tensor) in names}


def gather_state(model: nn.Module, links: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the state that ``link_state`` has found, whole; all processes must call this."""
    live = _list_tensors(model)
    return {name: gather(live[found]) for name, found in links.items()}


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model's parameters are spread over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def gather(tensor: Tensor) -> Tensor:
    """Return a whole tensor, without gradient; all processes must call this."""
    found = tensor.detach()
    whole: Callable[[], Tensor] | None = getattr(found, "full_tensor", None)
    return whole() if whole else found


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Spread a whole tensor as a parameter of the same shape is."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = parameter
    return distribute_tensor(tensor.to(parameter.device), spread.device_mesh, spread.placements)


def _list_tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))
