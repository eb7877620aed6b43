"""Everything a training needs to go on bit for bit, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltaspec.training.loop.sharded import gather, shard_like
from deltaspec.types.running import Accelerator

TRAINED, MOMENTS, RANDOM = "trained/", "optimizer/", "random/"


def pack_state(trained: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator) -> dict[str, Tensor]:
    """Collect what was trained, the optimiser's state, and every process's random generators.

    Parameters
    ----------
    trained : mapping of str to Tensor
    optimizer : torch.optim.Optimizer
    accelerator : accelerate.Accelerator
        All processes must call this; each gets all of it.

    Returns
    -------
    dict of str to Tensor
        Views of the live tensors: write them before the next step.
    """
    packed = {f"{TRAINED}{name}": tensor.detach() for name, tensor in trained.items()}
    for place, entry in optimizer.state_dict()["state"].items():
        packed |= {f"{MOMENTS}{place}/{key}": gather(torch.as_tensor(value)) for key, value in entry.items()}
    for name, state in _random_states(accelerator.device).items():
        gathered = accelerator.gather(state[None].to(accelerator.device, torch.int64)).cpu().to(torch.uint8)
        packed |= {f"{RANDOM}{name}/{rank}": state for rank, state in enumerate(gathered)}
    return packed


def unpack_trained(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what was trained, as ``pack_state`` was given it."""
    return {name.removeprefix(TRAINED): tensor for name, tensor in packed.items() if name.startswith(TRAINED)}


def unpack_state(packed: Mapping[str, Tensor], optimizer: Optimizer, accelerator: Accelerator) -> None:
    """Put back the optimiser's state and this process's random generators.

    Parameters
    ----------
    packed : mapping of str to Tensor
        As ``pack_state`` returned it; random generators are set last, so nothing may be drawn before the next step.
    optimizer : torch.optim.Optimizer
    accelerator : accelerate.Accelerator
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in packed.items():
        if name.startswith(MOMENTS):
            place, key = name.removeprefix(MOMENTS).split("/")
            state.setdefault(int(place), {})[key] = shard_like(tensor, parameters[int(place)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    rank = accelerator.process_index
    torch.set_rng_state(packed[f"{RANDOM}cpu/{rank}"])
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(packed[f"{RANDOM}cuda/{rank}"], accelerator.device)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
