"""The model that PEFT wraps: which module or parameter of it a stored tensor is, and what factors do there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from deltaspec.types import AdapterModule, Checkpoint, Place


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
    checked : str
        What tells that factors will act as changes of the weights: a library's class; "" where nothing does.
    unchecked : str
        Why nothing does, as half a sentence.
    """

    checked = ""
    unchecked = ""

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
        """Say why factors of a module would not act as a change of its weight; "" if they do."""

    @abstractmethod
    def swaps(self, stored: str, *, transposed: bool, stack: bool) -> bool:
        """Tell whether PEFT takes the inputs of a matrix for its outputs.

        Parameters
        ----------
        stored : str
            The base's tensor.
        transposed : bool
            Whether the matrix, as it is seen, is the stored one transposed.
        stack : bool
            Whether it is one of a stack.
        """

    def kind(self, module: AdapterModule, name: str) -> str:
        """Return what the module at ``name`` of the model is to PEFT: linear, conv1d, conv, embedding or stack."""
        del name
        return module.kind

    def parameters(self) -> Collection[str]:
        """List the model's parameters and buffers by their full names, as far as they are known."""
        return self.running.keys()

    def tied_with(self, name: str) -> frozenset[str]:
        """Return the model's parameters that are one tensor with this one, itself among them."""
        path = name.removesuffix(".weight")
        return frozenset({name, *(f"{use}.weight" for use, _ in self.uses(path))})

    @property
    def tie_matters(self) -> bool:
        """Whether the model computes otherwise where its config says that head and embedding are two weights."""
        return False

    @property
    def attachment(self) -> str:
        """Whether it is known what factors will do, and by what, in words."""
        return f"checked with {self.checked}" if self.checked else f"not checked ({self.unchecked})"

    def list_unstored(self) -> list[str]:
        """List the model's parameters that the base stores under no name, so that the library draws them at random."""
        return []

    def lacks(self, name: str) -> bool:
        """Tell whether the model has no parameter of this full name, as far as that is known."""
        del name
        return False

    def is_typed(self, path: str) -> bool:
        """Tell whether the model asks for a module's class, so that PEFT must not wrap it to save it whole."""
        del path
        return False

    def is_read(self, path: str) -> bool:
        """Tell whether the model takes a module's weight itself, so that factors beside it do nothing there."""
        del path
        return False

    def unattached(self, path: str, *, as_parameter: bool = False) -> str:
        """Say why factors that an adapter's file has under a path would not change what it names; "" where they would.

        Parameters
        ----------
        path : str
        as_parameter : bool
            Whether target_parameters lists it.
        """
        del path, as_parameter
        return ""

    def holders(self, path: str) -> list[str]:
        """List the modules that factors of a module are written for: itself, and those tied to it."""
        return [*([] if self.is_unread(path) else [path]), *(use for use, _ in self.uses(path))]


def _ancestors(name: str) -> list[str]:
    """List the modules around a parameter, the nearest first."""
    pieces = name.split(".")
    return [".".join(pieces[:i]) for i in range(len(pieces) - 1, 0, -1)]
