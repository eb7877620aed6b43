"""PEFT's side: a base that runs with an adapter, and the state that it computes with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
TOLERANCE = 1e-4


@dataclass(slots=True)
class Attached:
    """A base with an adapter on it, and what PEFT complained of while loading."""

    model: Any
    complaints: list[str] = field(default_factory=list)


def load(cls: Any, folder: Path) -> Any:
    """Load a folder with a class, in float32."""
    kwargs = {"dtype": torch.float32} if cls.__module__.startswith("transformers") else {}
    return cls.from_pretrained(folder, **kwargs).eval()


def attach(cls: Any, base: Path, adapter: Path) -> Attached:
    """Load base and adapter from their files; keys that do not fit are complaints."""
    results: list[Any] = []
    with _spying(results), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = Attached(peft.PeftModel.from_pretrained(load(cls, base), adapter).eval())
    for result in results:
        unexpected = list(getattr(result, "unexpected_keys", ()))
        if unexpected:
            attached.complaints.append(f"unexpected keys: {', '.join(unexpected[:3])} ({len(unexpected)})")
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            attached.complaints.append(str(warning.message)[:300])
    return attached


@contextmanager
def _spying(results: list[Any]) -> Iterator[None]:
    """Keep what PEFT's loading reports; from_pretrained drops it."""
    original = peft.PeftModel.load_adapter

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        results.append(original(self, *args, **kwargs))
        return results[-1]

    peft.PeftModel.load_adapter = load_adapter
    try:
        yield
    finally:
        peft.PeftModel.load_adapter = original


def effective_state(model: Any) -> State:
    """Merge each module's factors into a weight of its own: what it computes with, tied or not.

    PEFT's merge adds to a shared weight once for each use of it; running, each use adds its own factors. It also
    refuses a bias beside factors where the layer has none, which runs: such a layer gets a zero one first, and what
    that became is left out where it stayed zero. Changes the model.
    """
    seen: set[int] = set()
    added: list[nn.Parameter] = []
    for module in model.modules():
        inner = getattr(module, "base_layer", None)
        weight = getattr(inner, "weight", None)
        if not isinstance(weight, nn.Parameter) or not hasattr(module, "lora_A"):
            continue
        if id(weight) in seen or _uses(model, weight) > 1:
            inner.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        seen.add(id(weight))
        biases = [getattr(layer, "bias", None) for layer in module.lora_B.values()]
        if getattr(inner, "bias", None) is None and biases and biases[0] is not None:
            inner.bias = nn.Parameter(torch.zeros_like(biases[0]), requires_grad=False)
            added.append(inner.bias)
    state = {
        name: tensor for name, tensor in model.merge_and_unload().state_dict().items() if isinstance(tensor, Tensor)
    }
    places = {bias.data_ptr() for bias in added if not bias.any()}
    return {name: tensor.detach().clone() for name, tensor in state.items() if tensor.data_ptr() not in places}


def _uses(model: Any, weight: nn.Parameter) -> int:
    return sum(p is weight for module in model.modules() for p in module._parameters.values())


def compare(got: State, wanted: State, base: State, *, ran: bool = False) -> list[str]:
    """Name what differs, each with its error relative to the effect of the fine-tune on that tensor.

    Where outputs agreed (``ran``), a second name of a tied tensor may differ while another name of it is right: some
    models keep a parameter under a name that their forward does not use.
    """
    wrong = _differences(got, wanted, base)
    if ran:
        wrong = {name: text for name, text in wrong.items() if not _others(base, name) - wrong.keys()}
    return list(wrong.values())


def _others(state: State, name: str) -> set[str]:
    """Name the tensors of a state that share a tensor's memory."""
    if name not in state:
        return set()
    place = state[name].data_ptr()
    return {other for other, tensor in state.items() if tensor.data_ptr() == place and other != name}


def _differences(got: State, wanted: State, base: State) -> dict[str, str]:
    wrong = {}
    for name in sorted(got.keys() | wanted.keys()):
        if name not in got or name not in wanted:
            wrong[name] = f"{name}: only in {'the result' if name in got else 'the wanted model'}"
            continue
        first, second = got[name].double(), wanted[name].double()
        if first.shape != second.shape:
            wrong[name] = f"{name}: {tuple(first.shape)} instead of {tuple(second.shape)}"
            continue
        before = base[name].double() if name in base and base[name].shape == second.shape else torch.zeros_like(second)
        error, effect = float((first - second).norm()), float((second - before).norm())
        if not error <= TOLERANCE * max(effect, 1e-2 * float(second.norm()), 1e-12):
            wrong[name] = f"{name}: off by {error:.3g} of an effect of {effect:.3g}"
    return wrong


def distance(got: State, wanted: State, base: State) -> tuple[float, str]:
    """Return the largest error of an output, relative to the effect of the change, and its place."""
    worst, where = 0.0, ""
    for place, value in wanted.items():
        if place not in got or got[place].shape != value.shape:
            return float("inf"), place
        effect = (
            float((value.double() - base[place].double()).norm())
            if place in base and base[place].shape == value.shape
            else 0.0
        )
        error = float((got[place].double() - value.double()).norm())
        floor = 1e-3 * float(value.double().norm())
        ratio = error / max(effect, floor, 1e-12)
        if not ratio <= worst:
            worst, where = ratio, place
    return worst, where
