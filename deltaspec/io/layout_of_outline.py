"""The running model of a checkpoint as the library that makes it has it."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import final

from deltaspec.architecture.running_names import is_turned, misfit
from deltaspec.io.content import same_content
from deltaspec.io.layout_of_table import TAKEN
from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterModule, Checkpoint, Holder, Outline, Place, TensorSpec


@lru_cache(maxsize=64)
def _same_once(first: TensorSpec, second: TensorSpec, stamps: tuple[tuple[int, int], ...]) -> bool:
    """Compare two tensors once for as long as their files stay as they are: a vocabulary is gigabytes."""
    del stamps
    return same_content(first, second)


@final
class LayoutOfOutline(Layout):
    """The running model, its modules and its ties, outlined without weights."""

    def __init__(self, base: Checkpoint, untied: Collection[str], outline: Outline) -> None:
        super().__init__(base, outline.place(base.tensors))
        self.checked, self._outline = outline.source, outline
        self.modules |= frozenset(outline.holders)
        self._apart = {place.name for name in untied for place in self.place(name)}
        self._stacked = any(".experts." in f"{name}." for name in outline.shapes)

    @property
    def tie_matters(self) -> bool:
        """Whether the model computes otherwise where its config unties its weights."""
        return self._outline.tie_matters

    def place(self, path: str) -> tuple[Place, ...]:
        """Return where a tensor lies."""
        name = path if path in self.places or path in self._outline.shapes else f"{path}.weight"
        name = path if path.endswith((".weight", ".bias")) else name
        return self.places.get(name) or self._outline.place([name])[name]

    def uses(self, path: str) -> list[tuple[str, str]]:
        """List the modules that share its weight."""
        name = f"{path}.weight"
        others = self._outline.tied_with(name) - {name} - self._apart
        found = [other.removesuffix(".weight") for other in sorted(others) if self._same(name, other)]
        return [(other, self._holder(other).kind) for other in found if other not in self._outline.unread]

    def is_unread(self, path: str) -> bool:
        """Tell whether its own path is not read."""
        return path in self._outline.unread and bool(self.uses(path))

    def needs_parameter(self, module: AdapterModule, name: str) -> bool:
        """Tell whether PEFT reaches it only as a parameter."""
        path = name.removesuffix(".weight")
        taken = module.kind == "linear" and self._stacked and TAKEN.search(path)
        return bool(taken) or path == name or not self._holder(path).wrapped

    def refusal(self, module: AdapterModule) -> str:
        """Say why factors would not act; "" if they do."""
        if self._outline.unloadable:
            return self._outline.unloadable
        places = self.place(module.path)
        stored = self.base.tensors.get(module.path) or self.base.tensors.get(f"{module.path}.weight")
        reason = misfit(places, stored.shape, self._outline) if stored else ""
        return reason or next((said for place in places if (said := self._refusal(module, place))), "")

    def kind(self, module: AdapterModule, name: str) -> str:
        """Return what PEFT takes it for."""
        kind = self._holder(name.removesuffix(".weight")).kind
        return module.kind if kind == "other" or module.kind == "stack" else kind

    def swaps(self, stored: str, *, transposed: bool, stack: bool) -> bool:
        """Tell whether PEFT takes its inputs for outputs."""
        place = self.place(stored)[0]
        path = place.name.removesuffix(".weight")
        if not stack:
            kind = self._holder(path).kind
            return kind in ("linear", "conv1d") and transposed != (kind == "conv1d")
        spec, held = self.base.tensors.get(stored), self._outline.shapes.get(place.name, ())
        exchanged = place.expert is None and spec is not None and is_turned(spec.shape, held)
        return (transposed != exchanged) != self._holder(place.name.rpartition(".")[0]).turned

    def parameters(self) -> Collection[str]:
        """List the model's parameters and buffers."""
        return self._outline.shapes.keys()

    def tied_with(self, name: str) -> frozenset[str]:
        """Return the parameters that are one tensor with this one."""
        return self._outline.tied_with(name)

    def list_unstored(self) -> list[str]:
        """List the model's parameters that the base does not store."""
        trained = self._outline.shapes.keys() - self._outline.buffers - self.running.keys()
        return sorted(name for name in trained if not self._outline.tied_with(name) & self.running.keys())

    def lacks(self, name: str) -> bool:
        """Tell whether the model has no parameter of this name."""
        return name not in self._outline.shapes

    def is_typed(self, path: str) -> bool:
        """Tell whether the model asks for a module's class."""
        return path in self._outline.holders and self._outline.holders[path].typed

    def is_read(self, path: str) -> bool:
        """Tell whether the model takes a module's weight itself."""
        return self._holder(self.place(path)[0].name.removesuffix(".weight")).read

    def unattached(self, path: str, *, as_parameter: bool = False) -> str:
        """Say why factors under a path would not change what it names."""
        place = self.place(path)[0]
        name, module = place.name, place.name.removesuffix(".weight")
        if self._outline.unloadable:
            return self._outline.unloadable
        if name not in self._outline.shapes:
            return f"{self.checked} has no module of this name"
        if self._outline.takes_experts and (place.expert is not None or module.endswith((".gate", ".router"))):
            return ""
        looked_for = self._outline.in_peft(path)
        if looked_for not in (name, module):
            return f"in {self.checked} it is called '{module}', and PEFT looks for '{looked_for}'"
        holder = self._holder(module)
        if not holder.refusal and not as_parameter and not holder.wrapped and module != name:
            return f"a {holder.name}, for which PEFT has no LoRA"
        return holder.refusal

    def _holder(self, path: str) -> Holder:
        found = self._outline.holders.get(path) or self._outline.holders.get(path.rpartition(".")[0])
        return found or Holder("", "other", wrapped=False)

    def _same(self, name: str, other: str) -> bool:
        """Tell whether two tied parameters are one weight here: a library unties them where they are stored unlike."""
        first, second = (self.base.tensors.get(self.running.get(key, "")) for key in (name, other))
        if first is None or second is None or first == second:
            return True
        stamps = tuple((spec.file.stat().st_mtime_ns, spec.file.stat().st_size) for spec in (first, second))
        return (first.shape, first.dtype) == (second.shape, second.dtype) and _same_once(first, second, stamps)

    def _refusal(self, module: AdapterModule, place: Place) -> str:
        """Say why factors would not act at one place of the running model."""
        name, stack = place.name, module.kind == "stack" or place.expert is not None
        path = name.removesuffix(".weight")
        holder = self._holder(path)
        axes = len(self._outline.shapes[name])
        if holder.refusal:
            return holder.refusal
        if not holder.wrapped and module.kind == "conv":
            return f"a {holder.name} with settings that PEFT has no factors for"
        if module.kind == "stack" and module.experts == 1 and module.transposed:
            return "a stack of one expert stored as (d_in, d_out) has no layout in PEFT"
        if not stack and not holder.wrapped and axes != 2:
            return f"a {holder.name}, for which PEFT has no LoRA"
        if self._outline.in_peft(path) != path:
            return "PEFT renames it on loading, and then does not find it"
        tied = [use for use, _ in self.uses(path) if self._holder(use).refusal]
        return f"it is tied to '{tied[0]}': {self._holder(tied[0]).refusal}" if tied else ""
