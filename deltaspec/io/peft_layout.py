"""Which module or parameter of the model that PEFT wraps a stored tensor is: of a checkpoint, or as adapters say."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

from deltaspec.architecture.running_names import ODD_EMBEDDINGS, SHARED, STRIDED, Place, place_tensors
from deltaspec.io.content import list_tied
from deltaspec.types import AdapterModule, Checkpoint

# PEFT 0.21 takes modules of these names for experts of older checkpoints where the model has stacks, so that they can
# only be reached as parameters; routers are no linear layers there.
TAKEN = re.compile(r"(^|\.)(gate|router|gate_proj|up_proj|down_proj|w1|w2|w3)$")


@dataclass(frozen=True, slots=True)
class StandIn(Checkpoint):
    """What adapters say of a base that is not read: its tensors have the names that PEFT gave them.

    ``parameters`` are the paths that target_parameters lists.
    """

    parameters: frozenset[str] = frozenset()


class Layout(ABC):
    """The model that PEFT wraps.

    Attributes
    ----------
    base : Checkpoint
    places : mapping
        Stored name → where it lies in the model.
    running : mapping
        A parameter's full name in the model → stored name.
    modules : frozenset of str
        Paths of all modules around these parameters.
    """

    def __init__(self, base: Checkpoint, places: Mapping[str, tuple[Place, ...]]) -> None:
        self.base, self.places = base, places
        self.running = {place.name: name for name, found in places.items() for place in found}
        self.modules = frozenset(module for name in self.running for module in _ancestors(name))

    @abstractmethod
    def place(self, path: str) -> tuple[Place, ...]:
        """Return where a tensor lies, given its name or the path of the module whose weight it is."""

    @abstractmethod
    def uses(self, path: str) -> list[tuple[str, str]]:
        """List the modules, with their kinds, that share the weight of an embedding."""

    @abstractmethod
    def is_unread(self, path: str) -> bool:
        """Tell whether no module of the model reads a weight under this path, but only under those of its uses."""

    @abstractmethod
    def needs_parameter(self, module: AdapterModule, name: str) -> bool:
        """Tell whether PEFT reaches what lies at ``name`` of the model only as one of target_parameters."""

    @abstractmethod
    def refusal(self, module: AdapterModule) -> str:
        """Say why the model cannot work with PEFT's wrapper around a module; "" if it can."""

    def holders(self, path: str) -> list[str]:
        """List the modules that factors of a module are written for: itself, and those tied to it."""
        return [*([] if self.is_unread(path) else [path]), *(use for use, _ in self.uses(path))]


def lay_out(base: Checkpoint, untied: Collection[str] = ()) -> Layout:
    """Lay out a base, or what stands in for one.

    Parameters
    ----------
    base : Checkpoint
    untied : collection of str
        Heads that its embedding shall not serve, although the base ties them.
    """
    return _AsAdaptersSay(base) if isinstance(base, StandIn) else _OfCheckpoint(base, untied)


@final
class _OfCheckpoint(Layout):
    """The running model of a checkpoint, as far as its stored names and its config tell it."""

    def __init__(self, base: Checkpoint, untied: Collection[str]) -> None:
        super().__init__(base, place_tensors(base.tensors, base.config))
        self._apart = {place.name.removesuffix(".weight") for name in untied for place in self.place(name)}
        self._stacked = any(".experts." in f"{name}." for name in self.running)

    def place(self, path: str) -> tuple[Place, ...]:
        name = path if path in self.places or path.endswith((".weight", ".bias")) else f"{path}.weight"
        return self.places.get(name) or place_tensors([name], self.base.config)[name]

    def uses(self, path: str) -> list[tuple[str, str]]:
        return [use for use in list_tied(self.base, path, self.running) if use[0] not in self._apart]

    def is_unread(self, path: str) -> bool:
        return bool(SHARED.fullmatch(path))

    def needs_parameter(self, module: AdapterModule, name: str) -> bool:
        taken = module.kind == "linear" and self._stacked and TAKEN.search(name.removesuffix(".weight"))
        return bool(taken) or not name.endswith(".weight")

    def refusal(self, module: AdapterModule) -> str:
        if module.kind == "conv" and module.kernel[:1] == (1,) and module.shape[0] > 1:
            return "its kernel has one input channel: a grouped convolution, whose factors PEFT lays out otherwise"
        if module.kind == "conv" and STRIDED.search(module.path):
            return "the model reads attributes of this convolution that PEFT's wrapper lacks"
        if module.kind == "embedding" and ODD_EMBEDDINGS.search(module.path):
            return "the model reads this embedding by other means than ids"
        if module.kind == "stack" and module.experts == 1 and module.transposed:
            return "a stack of one expert stored as (d_in, d_out) has no layout in PEFT"
        weight = self.place(module.path)[0].name.removesuffix(".weight")
        if weight.endswith(".out_proj") and f"{weight.rpartition('.')[0]}.in_proj_weight" in self.running:
            return (
                "torch's MultiheadAttention reads this weight without calling its module, so that factors have no "
                "effect"
            )
        return ""


@final
class _AsAdaptersSay(Layout):
    """The model as the names in its adapters' files have it: nothing is renamed, tied or refused."""

    def __init__(self, base: StandIn) -> None:
        super().__init__(base, {name: (Place(name),) for name in base.tensors})
        self._parameters = base.parameters

    def place(self, path: str) -> tuple[Place, ...]:
        whole = path in self._parameters or path in self.places or path.endswith((".weight", ".bias"))
        return (Place(path if whole else f"{path}.weight"),)

    def uses(self, path: str) -> list[tuple[str, str]]:
        del path
        return []

    def is_unread(self, path: str) -> bool:
        del path
        return False

    def needs_parameter(self, module: AdapterModule, name: str) -> bool:
        del name
        return module.path in self._parameters

    def refusal(self, module: AdapterModule) -> str:
        del module
        return ""


def _ancestors(name: str) -> list[str]:
    """List the modules around a parameter, the nearest first."""
    pieces = name.split(".")
    return [".".join(pieces[:i]) for i in range(len(pieces) - 1, 0, -1)]
