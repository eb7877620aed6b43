"""Module names whose dots were written as underscores (kohya's): which module of the base is meant.

A file may hold several components (a UNet, text encoders). Each is looked for in the base by its names and shapes;
what the base holds is taken, what belongs to another model is told, and two that are the same modules are a tie.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from deltaspec.errors import OptionError, PairingError
from deltaspec.pairing.homes import factor_shape
from deltaspec.pairing.plan import Plan
from deltaspec.types import AdapterIndex, Checkpoint, LowRankTerm

COMPONENT = re.compile(r"lora_([a-z0-9]+)_")
T = TypeVar("T")
Paths = dict[str, dict[str, list[str]]]
Component = dict[str, LowRankTerm]
"""Module names without the component's own, and their factors."""


def is_flattened(adapter: AdapterIndex) -> bool:
    """Tell whether all modules of an adapter have flattened names."""
    return bool(adapter.modules) and all(COMPONENT.match(module) for module in adapter.modules)


def take_component(sides: Sequence[T], component: str) -> list[T]:
    """Leave of each adapter with flattened names one component; all else stays as it is.

    Parameters
    ----------
    sides : sequence of whatever is opened
    component : str
        unet, te1, …; "" takes all.

    Raises
    ------
    OptionError
        If an adapter has no such component, or no side has any.
    """
    if not component:
        return list(sides)
    if not any(isinstance(side, AdapterIndex) and is_flattened(side) for side in sides):
        message = f"--component is '{component}', and no adapter here holds components, as files in kohya's naming do."
        raise OptionError(message)
    return [_take(side, component) if isinstance(side, AdapterIndex) and is_flattened(side) else side for side in sides]


def _take(adapter: T, component: str) -> T:
    assert isinstance(adapter, AdapterIndex)
    modules = {name: term for name, term in adapter.modules.items() if name.startswith(f"lora_{component}_")}
    if not modules:
        held = sorted({match[1] for name in adapter.modules if (match := COMPONENT.match(name))})
        message = f"--component is '{component}': {adapter.ref} holds {', '.join(held)}."
        raise OptionError(message)
    return replace(adapter, modules=modules)


def resolve_flattened(adapter: AdapterIndex, base: Checkpoint, plan: Plan) -> AdapterIndex:
    """Give the modules of an adapter with flattened names their paths in the base; any other is returned as it is.

    Parameters
    ----------
    adapter : AdapterIndex
    base : Checkpoint
    plan : Plan
        Notes components of another model.

    Raises
    ------
    PairingError
        If the base has none of them, some modules of one, or two that a name may mean; or two components are the same
        modules of the base.
    """
    if not is_flattened(adapter):
        return adapter
    components = _list_components(adapter)
    paths = _flatten(base)
    found = {name: _resolve(name, modules, paths, base) for name, modules in components.items()}
    held = {name: _held(resolved, components[name], base) for name, resolved in found.items()}
    whole = [name for name, resolved in found.items() if resolved and held[name] == len(components[name])]
    for name in components if len(components) > 1 else ():
        if name not in whole and 2 * held[name] > len(components[name]):
            raise _lacking(_first_unheld(name, components[name], found[name], base), base)
    if not whole:
        whole = [max(components, key=lambda name: (held[name], len(found[name])))]
        if len(found[whole[0]]) < len(components[whole[0]]):
            raise _lacking(_first_unheld(whole[0], components[whole[0]], found[whole[0]], base), base)
    absent = [name for name in components if name not in whole]
    out = [f"{name} ({len(components[name])} modules)" for name in absent]
    for name in out:
        plan.note(f"the adapter's {name} stays out: it is of another model than {base.ref}, or of another layout")
    beside = _count_beside(base, {name: found[name] for name in whole})
    if any(len(components[name]) <= beside for name in absent):
        message = (
            f"The adapter's {' and '.join(out)} {'has' if len(out) == 1 else 'have'} no place in {base.ref}, which has "
            f"its {' and '.join(whole)}: of another model, or in another layout; say which is meant, with --component "
            f"{whole[0]}."
        )
        raise PairingError(message)
    _refuse_tie({name: found[name] for name in whole}, base)
    modules = {found[name][module]: term for name in whole for module, term in components[name].items()}
    return replace(adapter, modules=modules)


def _count_beside(base: Checkpoint, found: dict[str, dict[str, str]]) -> int:
    """Count a base's matrices beside the towers of these components: another component may be among them."""
    towers = {path[: max(0, len(path) - len(name))] for paths in found.values() for name, path in paths.items()}
    return sum(len(spec.shape) > 1 and not name.startswith(tuple(towers)) for name, spec in base.tensors.items())


def _list_components(adapter: AdapterIndex) -> dict[str, Component]:
    components: defaultdict[str, Component] = defaultdict(dict)
    for module, term in adapter.modules.items():
        if match := COMPONENT.match(module):
            components[match[1]][module.removeprefix(match[0])] = term
    return dict(components)


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


def _resolve(component: str, modules: Component, paths: Paths, base: Checkpoint) -> dict[str, str]:
    """Find the prefix under which the base has most modules of a component, in shape; {} where it has none.

    The component's names may begin with what the base's lack (a text encoder saved by itself).
    """
    held: dict[tuple[str, str], tuple[int, int]] = {}
    for lacked in _beginnings(modules):
        names = [name.removeprefix(lacked) for name in modules]
        for prefix in [""] if lacked else paths:
            rests = paths.get(prefix, {})
            rows = [(rests[name], modules[lacked + name]) for name in names if name in rests]
            if rows:
                fitting = sum(any(_fits(path, term, base) for path in candidates) for candidates, term in rows)
                held[prefix, lacked] = (fitting, len(rows))
    if not held:
        return {}
    best = max(held.values())
    ways = sorted(way for way, count in held.items() if count == best)
    whole = ("", "")
    if len(ways) > 1 and whole not in ways and best[0] == len(modules):
        first = next(iter(modules))
        raise _ambiguous(component, first, [paths[prefix][first.removeprefix(cut)][0] for prefix, cut in ways], base)
    prefix, lacked = whole if whole in ways else ways[0]
    rests = paths[prefix]
    found = {
        name: _pick(rests[name.removeprefix(lacked)], term, base)
        for name, term in modules.items()
        if name.removeprefix(lacked) in rests
    }
    for name, candidates in found.items():
        if len(candidates) > 1:
            raise _ambiguous(component, name, candidates, base)
    return {name: candidates[0] for name, candidates in found.items()}


def _beginnings(modules: Component) -> list[str]:
    """List what all names of a component begin with, up to an underscore: nothing first."""
    first = next(iter(modules))
    cuts = [first[: place + 1] for place, letter in enumerate(first) if letter == "_"]
    return ["", *(cut for cut in cuts if all(name.startswith(cut) for name in modules))]


def _pick(paths: list[str], term: LowRankTerm, base: Checkpoint) -> list[str]:
    """Return the modules of one flattened name whose shape fits; all where none does."""
    return [path for path in paths if _fits(path, term, base)] or paths


def _fits(path: str, term: LowRankTerm, base: Checkpoint) -> bool:
    shape = base.tensors[f"{path}.weight"].shape
    return len(shape) > 1 and (shape[0], math.prod(shape[1:])) == factor_shape(term)


def _held(resolved: dict[str, str], modules: Component, base: Checkpoint) -> int:
    """Count the modules of a component that the base holds in shape."""
    return sum(_fits(path, modules[name], base) for name, path in resolved.items())


def _first_unheld(component: str, modules: Component, resolved: dict[str, str], base: Checkpoint) -> str:
    missing = (name for name in modules if name not in resolved or not _fits(resolved[name], modules[name], base))
    return f"lora_{component}_{next(missing)}"


def _refuse_tie(found: dict[str, dict[str, str]], base: Checkpoint) -> None:
    owner: dict[str, str] = {}
    for component, resolved in found.items():
        for path in resolved.values():
            if path in owner:
                message = (
                    f"The adapter's {owner[path]} and {component} both fit '{path}' of {base.ref}: say which is meant "
                    f"with --component {owner[path]} or --component {component}."
                )
                raise PairingError(message)
            owner[path] = component


def _lacking(module: str, base: Checkpoint) -> PairingError:
    message = (
        f"The adapter targets '{module}', and {base.ref} has no module of that name and shape with dots for "
        "underscores: pass the base it was trained from, in the layout that its names follow."
    )
    return PairingError(message)


def _ambiguous(component: str, name: str, paths: list[str], base: Checkpoint) -> PairingError:
    message = (
        f"The adapter's 'lora_{component}_{name}' may be '{paths[0]}' or '{paths[1]}' of {base.ref}: give the "
        "component it is meant for as a checkpoint of its own."
    )
    return PairingError(message)
