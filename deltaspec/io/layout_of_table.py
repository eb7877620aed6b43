"""The running model of a checkpoint as far as its names, its config and our table tell: no library knows it."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property
from typing import final

from deltaspec.architecture.running_names import ODD_EMBEDDINGS, SHARED, STRIDED, is_told, place_by_table
from deltaspec.io.content import list_tied
from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterModule, Checkpoint, Place

# PEFT 0.21 takes modules of these names for experts of older checkpoints where the model has stacks, so that they can
# only be reached as parameters; routers are no linear layers there.
TAKEN = re.compile(r"(^|\.)(gate|router|gate_proj|up_proj|down_proj|w1|w2|w3)$")


@final
class LayoutOfTable(Layout):
    """The running model of a checkpoint, as far as its stored names and its config tell it."""

    def __init__(self, base: Checkpoint, untied: Collection[str], unchecked: str) -> None:
        super().__init__(base, place_by_table(base.tensors, base.config))
        self.unchecked = unchecked
        self._apart = {place.name.removesuffix(".weight") for name in untied for place in self.place(name)}
        self._stacked = any(".experts." in f"{name}." for name in self.running)

    def place(self, path: str) -> tuple[Place, ...]:
        """Return where a tensor lies."""
        name = path if path in self.places or path.endswith((".weight", ".bias")) else f"{path}.weight"
        return self.places.get(name) or place_by_table([name], self.base.config)[name]

    def uses(self, path: str) -> list[tuple[str, str]]:
        """List the modules that share its weight."""
        return [use for use in list_tied(self.base, path, self.running) if use[0] not in self._apart]

    @cached_property
    def _decoders(self) -> dict[str, str]:
        """Biases of tied decoders → those of the modules around them, which BERT's share."""
        paths = [name.removesuffix(".weight") for name in self.running if name.endswith(".weight")]
        tied = {use for path in paths for use, _ in self.uses(path) if use.endswith(".decoder")}
        outer = {f"{use}.bias": f"{use.rpartition('.')[0]}.bias" for use in tied}
        return {bias: around for bias, around in outer.items() if around in self.running}

    def parameters(self) -> Collection[str]:
        """List the parameters that the base stores, and the biases that are tied to them."""
        return {*self.running, *self._decoders}

    def tied_with(self, name: str) -> frozenset[str]:
        """Return what is one tensor with a parameter."""
        inner = {bias for bias, around in self._decoders.items() if name in (bias, around)}
        if inner:
            return frozenset({name, *inner, *(self._decoders[bias] for bias in inner)})
        return super().tied_with(name)

    def is_unread(self, path: str) -> bool:
        """Tell whether its own path is not read."""
        return bool(SHARED.fullmatch(path))

    def needs_parameter(self, module: AdapterModule, name: str) -> bool:
        """Tell whether PEFT reaches it only as a parameter."""
        taken = module.kind == "linear" and self._stacked and TAKEN.search(name.removesuffix(".weight"))
        return bool(taken) or not name.endswith(".weight")

    def refusal(self, module: AdapterModule) -> str:
        """Say why factors would not act; "" if they do."""
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

    def swaps(self, stored: str, *, transposed: bool, stack: bool) -> bool:
        """Tell whether PEFT takes its inputs for outputs."""
        del stored
        return stack and transposed != is_told(self.base.config)
