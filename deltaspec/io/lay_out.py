"""A base → the layout of the model that PEFT wraps, by the best that is known of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from deltaspec.architecture.running_names import outline_checkpoint
from deltaspec.io.layout_of_outline import LayoutOfOutline
from deltaspec.io.layout_of_table import LayoutOfTable
from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterModule, Checkpoint, Place


@dataclass(frozen=True, slots=True)
class StandIn(Checkpoint):
    """What adapters say of a base that is not read: its tensors have the names that PEFT gave them.

    ``parameters`` are the paths that target_parameters lists.
    """

    parameters: frozenset[str] = frozenset()


def lay_out(base: Checkpoint, untied: Collection[str] = ()) -> Layout:
    """Lay out a base, or what stands in for one.

    Parameters
    ----------
    base : Checkpoint
    untied : collection of str
        Heads that its embedding shall not serve, although the base ties them.
    """
    if isinstance(base, StandIn):
        return _AsAdaptersSay(base)
    outline = outline_checkpoint({name: spec.shape for name, spec in base.tensors.items()}, base.config)
    if isinstance(outline, str):
        return LayoutOfTable(base, untied, outline)
    return LayoutOfOutline(base, untied, outline)


@final
class _AsAdaptersSay(Layout):
    """The model as the names in its adapters' files have it: nothing is renamed, tied or refused."""

    def __init__(self, base: StandIn) -> None:
        super().__init__(base, {name: (Place(name),) for name in base.tensors})
        self._parameters = base.parameters
        self.unchecked = "the base is not read"

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

    def swaps(self, stored: str, *, transposed: bool, stack: bool) -> bool:
        del stored
        return stack and transposed
