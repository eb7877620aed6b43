"""An adapter's modules as PEFT holds them: which module or parameter of the running model they change."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deltaspec.io.running import ODD_EMBEDDINGS, SHARED, STRIDED, Place, is_told, list_tied, place_tensors
from deltaspec.types import AdapterModule, Checkpoint

Factors = tuple[Tensor, Tensor]
# PEFT 0.21 takes modules of these names for experts of older checkpoints where the model has stacks, so that they can
# only be reached as parameters; routers are no linear layers there.
TAKEN = re.compile(r"(^|\.)(gate|router|gate_proj|up_proj|down_proj|w1|w2|w3)$")


@dataclass(frozen=True, slots=True)
class Target:
    """One module of the running model and its factors.

    ``parameter`` is the full name that target_parameters lists, "" for target_modules. ``swapped`` stacks are stored
    (d_in, d_out) without PEFT knowing: it takes their inputs for outputs. ``sources`` are the paths in the base.
    """

    module: AdapterModule
    sources: tuple[str, ...]
    parameter: str = ""
    swapped: bool = False

    @property
    def path(self) -> str:
        """The module that PEFT wraps."""
        return self.parameter.rpartition(".")[0] if self.parameter else self.module.path


@dataclass(frozen=True, slots=True)
class StandIn(Checkpoint):
    """What an adapter says of its base: names are the running model's, ``parameters`` those of target_parameters."""

    parameters: frozenset[str] = frozenset()


class Layout:
    """The running model of a base, as far as its stored names tell it, or of a stand-in, whose names stay."""

    def __init__(self, base: Checkpoint, untied: Collection[str] = ()) -> None:
        """Place every tensor of the base; ``untied`` are heads that its embedding shall not serve."""
        self.base = base
        self.literal = base.parameters if isinstance(base, StandIn) else None
        names = base.tensors
        self.places = place_tensors(names, base.config) if self.literal is None else {n: (Place(n),) for n in names}
        self.running = {place.name: name for name, places in self.places.items() for place in places}
        self.modules = {m for name in self.running for m in _ancestors(name)}
        self.apart = {p.name.removesuffix(".weight") for n in untied for p in self.place(n)}
        self.stacked = any(".experts." in f"{name}." for name in self.running)

    def place(self, path: str) -> tuple[Place, ...]:
        """Return where a tensor lies, given its name or the path of the module whose weight it is."""
        name = path if path in self.places or path.endswith((".weight", ".bias")) else f"{path}.weight"
        if self.literal is not None:
            return (Place(path if path in self.literal else name),)
        return self.places.get(name) or place_tensors([name], self.base.config)[name]

    def uses(self, path: str) -> list[tuple[str, str]]:
        """List the modules, with their kinds, that share the weight of an embedding."""
        tied = list_tied(self.base, path, self.running) if self.literal is None else ()
        return [use for use in tied if use[0] not in self.apart]

    def holders(self, path: str) -> list[str]:
        """List the modules that factors of a running module are written for: itself, and those tied to it."""
        return [*([] if SHARED.fullmatch(path) else [path]), *(use for use, _ in self.uses(path))]


def make_targets(modules: Sequence[AdapterModule], layout: Layout) -> tuple[list[Target], dict[str, str]]:
    """Turn modules under the base's names into those of the running model.

    Experts stored one by one become stacks, w1 and w3 block-diagonal in one; a split matrix becomes its parts, which
    share lora_A; an embedding's factors are repeated for each module that is tied to it.

    Returns
    -------
    targets : list of Target
    refused : dict
        Path → why PEFT cannot hold its factors.
    """
    found: list[Target] = []
    refused: dict[str, str] = {}
    experts: defaultdict[str, list[tuple[Place, AdapterModule]]] = defaultdict(list)
    for module in modules:
        places = layout.place(module.path)
        if places[0].expert is not None:
            experts[places[0].name].append((places[0], module))
        elif reason := _unfit(module, layout):
            refused[module.path] = reason
        else:
            found += [_target(module, place, layout) for place in places]
    found += [_stack(name, members, layout) for name, members in experts.items()]
    given = {target.module.path for target in found}
    for target in [target for target in found if target.module.kind == "embedding"]:
        uses = [use for use in layout.uses(target.module.path) if use[0] not in given]
        found += [replace(target, module=replace(target.module, path=path, kind=kind)) for path, kind in uses]
        if SHARED.fullmatch(target.module.path) and layout.literal is None:
            found.remove(target)
    return found, refused


def _unfit(module: AdapterModule, layout: Layout) -> str:
    if layout.literal is not None:
        return ""
    if module.kind == "conv" and module.kernel[:1] == (1,) and module.shape[0] > 1:
        return "its kernel has one input channel: a grouped convolution, whose factors PEFT lays out otherwise"
    if module.kind == "conv" and STRIDED.search(module.path):
        return "the model reads attributes of this convolution that PEFT's wrapper lacks"
    if module.kind == "embedding" and ODD_EMBEDDINGS.search(module.path):
        return "the model reads this embedding by other means than ids"
    if module.kind == "stack" and module.experts == 1 and module.transposed:
        return "a stack of one expert stored as (d_in, d_out) has no layout in PEFT"
    weight = layout.place(module.path)[0].name.removesuffix(".weight")
    if weight.endswith(".out_proj") and f"{weight.rpartition('.')[0]}.in_proj_weight" in layout.running:
        return "torch's MultiheadAttention reads this weight without calling its module, so that factors have no effect"
    return ""


def _target(module: AdapterModule, place: Place, layout: Layout) -> Target:
    path, name = module.path, place.name
    if place.parts > 1:
        module = _part(module, place)
    if module.kind == "stack":
        swapped = _is_swapped(module, layout)
        return Target(replace(module, path=name), (path,), name, swapped)
    plain = name.removesuffix(".weight")
    by_parameter = not name.endswith(".weight") or (module.kind == "linear" and layout.stacked and TAKEN.search(plain))
    if layout.literal is not None:
        by_parameter = path in layout.literal
    return Target(replace(module, path=plain), (path,), name if by_parameter else "")


def _is_swapped(module: AdapterModule, layout: Layout) -> bool:
    """Tell whether a stack is stored as (d_in, d_out) and PEFT is not told."""
    return module.transposed and not is_told(layout.base.config)


def _part(module: AdapterModule, place: Place) -> AdapterModule:
    """Return the rows of a matrix that the running model holds as a module of its own."""
    rows = module.shape[0] // place.parts

    def read() -> Factors:
        lora_A, lora_B = module.read()
        return lora_A, lora_B[place.part * rows : (place.part + 1) * rows]

    bias = module.read_bias
    cut = partial(_rows, bias, place.part * rows, rows) if bias else None
    return replace(module, shape=(rows, module.shape[1]), read=read, read_bias=cut)


def _rows(read: Callable[[], Tensor], start: int, length: int) -> Tensor:
    return read().narrow(0, start, length)


def _stack(name: str, members: list[tuple[Place, AdapterModule]], layout: Layout) -> Target:
    """Join experts stored one by one: each of the parts has its own columns of lora_B."""
    parts = members[0][0].parts
    stored = [place for places in layout.places.values() for place in places if place.name == name]
    count = 1 + max(place.expert or 0 for place in stored)
    ranks = [max((m.rank for p, m in members if p.part == part), default=0) for part in range(parts)]
    rows, d_in = members[0][1].shape
    held = {(place.expert, place.part): module for place, module in members}

    def read() -> Factors:
        lora_A, lora_B = torch.zeros(count, sum(ranks), d_in), torch.zeros(count, parts * rows, sum(ranks))
        for (expert, part), module in held.items():
            one, other = module.read()
            at = sum(ranks[:part])
            lora_A[expert, at : at + one.shape[0]] = one
            lora_B[expert, part * rows : (part + 1) * rows, at : at + one.shape[0]] = other
        return lora_A, lora_B

    joined = AdapterModule(name, "stack", (parts * rows, d_in), sum(ranks), read, experts=count)
    return Target(joined, tuple(module.path for _, module in members), name)


def _ancestors(name: str) -> list[str]:
    """List the modules around a parameter, the nearest first."""
    pieces = name.split(".")
    return [".".join(pieces[:i]) for i in range(len(pieces) - 1, 0, -1)]
