"""Module names whose dots were written as underscores (kohya's): which module of the base is meant."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from deltaspec.errors import PairingError
from deltaspec.pairing.plan import Plan
from deltaspec.types import AdapterIndex, Checkpoint, NoteKind

COMPONENT = re.compile(r"lora_[a-z0-9]+_")
Paths = dict[str, dict[str, list[str]]]


def is_flattened(adapter: AdapterIndex) -> bool:
    """Tell whether all modules of an adapter have flattened names."""
    return bool(adapter.modules) and all(COMPONENT.match(module) for module in adapter.modules)


def resolve_flattened(adapter: AdapterIndex, base: Checkpoint, plan: Plan) -> AdapterIndex:
    """Give the modules of an adapter with flattened names their paths in the base; any other is returned as it is.

    Parameters
    ----------
    adapter : AdapterIndex
    base : Checkpoint
    plan : Plan
        Where a component that the base does not hold at all (a text encoder beside a UNet) is listed.

    Raises
    ------
    PairingError
        If the base has only some modules of a component, none at all, or two that a name may mean.
    """
    if not is_flattened(adapter):
        return adapter
    components: defaultdict[str, list[str]] = defaultdict(list)
    for module in adapter.modules:
        if match := COMPONENT.match(module):
            components[match[0]].append(module)
    paths = _flatten(base)
    found: dict[str, str] = {}
    for component, modules in components.items():
        resolved = _resolve(component, modules, paths, base)
        if not resolved:
            plan.skip(f"{component}*", NoteKind.ONE_SIDED, f"{base.ref} holds none of its {len(modules)} modules")
        found |= resolved
    if not found:
        raise _lacking(next(iter(adapter.modules)), base)
    return replace(adapter, modules={found[name]: term for name, term in adapter.modules.items() if name in found})


def _flatten(base: Checkpoint) -> Paths:
    """Map each way to cut a module's path into prefix and rest: prefix → flattened rest → module paths."""
    paths: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in base.tensors:
        path = name.removesuffix(".weight")
        if path == name:
            continue
        pieces = path.split(".")
        for cut in range(len(pieces)):
            prefix = "".join(f"{piece}." for piece in pieces[:cut])
            paths[prefix]["_".join(pieces[cut:])].append(path)
    return {prefix: dict(rests) for prefix, rests in paths.items()}


def _resolve(component: str, modules: list[str], paths: Paths, base: Checkpoint) -> dict[str, str]:
    """Find the prefix under which the base has all modules of a component; {} where it has none of them."""
    names = {module: module.removeprefix(component) for module in modules}
    fitting = [prefix for prefix, rests in paths.items() if all(name in rests for name in names.values())]
    if not fitting:
        held = max(paths, key=lambda prefix: sum(name in paths[prefix] for name in names.values()), default="")
        missing = [module for module, name in names.items() if name not in paths.get(held, {})]
        if len(missing) == len(modules):
            return {}
        raise _lacking(missing[0], base)
    if len(fitting) > 1 and "" not in fitting:
        raise _ambiguous(modules[0], [paths[prefix][names[modules[0]]][0] for prefix in fitting], base)
    rests = paths["" if "" in fitting else fitting[0]]
    for module, name in names.items():
        if len(rests[name]) > 1:
            raise _ambiguous(module, rests[name], base)
    return {module: rests[name][0] for module, name in names.items()}


def _lacking(module: str, base: Checkpoint) -> PairingError:
    message = (
        f"The adapter targets '{module}', and {base.ref} has no module of that name with dots for underscores: pass "
        "the base it was trained from, in the layout that its names follow."
    )
    return PairingError(message)


def _ambiguous(module: str, paths: list[str], base: Checkpoint) -> PairingError:
    message = (
        f"The adapter's '{module}' may be '{paths[0]}' or '{paths[1]}' of {base.ref}: give the component it is meant "
        "for as a checkpoint of its own."
    )
    return PairingError(message)
