"""An adapter's modules as PEFT holds them: which module or parameter of the running model they change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterModule, Place

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Target:
    """One module of the running model and its factors.

    ``parameter`` is the full name that target_parameters lists, "" for target_modules. Of a ``swapped`` one PEFT takes
    the inputs for outputs: a stack stored (d_in, d_out) without PEFT knowing, or a matrix whose family was not known.
    ``sources`` are the paths in the base.
    """

    module: AdapterModule
    sources: tuple[str, ...]
    parameter: str = ""
    swapped: bool = False

    @property
    def path(self) -> str:
        """The module that PEFT wraps."""
        return self.parameter.rpartition(".")[0] if self.parameter else self.module.path


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
        if reason := layout.refusal(module):
            refused[module.path] = reason
        elif places[0].expert is not None:
            experts[places[0].name].append((places[0], module))
        else:
            found += [_target(module, place, layout) for place in places]
    found += [_stack(name, members, layout) for name, members in experts.items()]
    given = {target.module.path for target in found}
    for target in [target for target in found if target.module.kind != "stack"]:
        uses = [use for use in layout.uses(target.module.path) if use[0] not in given]
        if uses and target.module.read_bias:
            refused[f"{target.sources[0]}.bias"] = f"its weight is tied to that of '{uses[0][0]}', and the bias is not"
            found.remove(target)
            target = replace(target, module=replace(target.module, read_bias=None))
            found.append(target)
        found += [_of_use(target, *use) for use in uses]
        given |= {path for path, _ in uses}
        if layout.is_unread(target.module.path):
            found.remove(target)
    return found, refused


def _target(module: AdapterModule, place: Place, layout: Layout) -> Target:
    path, name = module.path, place.name
    if place.parts > 1:
        module = _part(module, place)
    if module.kind == "stack":
        swapped = layout.swaps(path, transposed=module.transposed, stack=True)
        return Target(replace(module, path=name), (path,), name, swapped)
    parameter = name if layout.needs_parameter(module, name) else ""
    swapped = layout.swaps(f"{path}.weight", transposed=module.kind == "conv1d", stack=False)
    kind = "linear" if parameter else layout.kind(module, name)
    return Target(replace(module, path=name.removesuffix(".weight"), kind=kind), (path,), parameter, swapped)


def _of_use(target: Target, path: str, kind: str) -> Target:
    """Return the same factors for a module that is tied to the target's."""
    return Target(replace(target.module, path=path, kind=kind), target.sources, "", target.swapped)


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
