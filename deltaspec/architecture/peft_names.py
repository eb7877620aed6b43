"""How PEFT matches the names that ``adapter_config.json`` lists: what it changes, scales, folds and saves whole.

An entry of a list (target_modules, target_parameters, exclude_modules) means a path that is it, or ends in it after a
dot. A string in its place is a regular expression that must match the whole path. A key of rank_pattern or
alpha_pattern is one that must match the whole path, or its end after a dot. An entry of modules_to_save means every
module whose path ends in it, even in the middle of a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from deltaspec.types import AdapterIndex, Config

T = TypeVar("T")
PREFIX = "base_model.model."  # before the base's own paths in an adapter's file
NESTED = ("gate_up_proj", "down_proj")  # PEFT nests parameters of one module in this order, the first innermost


def ends_in(path: str, names: Collection[str]) -> bool:
    """Tell whether a path is one of the names, or ends in one after a dot.

    >>> ends_in("model.layers.0.mlp.down_proj", {"mlp.down_proj"}), ends_in("my_proj", {"proj"})
    (True, False)
    """
    pieces = path.split(".")
    return any(".".join(pieces[start:]) in names for start in range(len(pieces)))


def named_alike(paths: Collection[str], modules: Iterable[str]) -> list[str]:
    """List the modules that PEFT would take for one of these paths, because their names end in it.

    >>> named_alike(["proj"], ["proj", "layer.proj", "other"])
    ['layer.proj']
    """
    meant = set(paths)
    return [module for module in modules if module not in meant and ends_in(module, meant)]


def find_pattern(patterns: Mapping[str, T], path: str, otherwise: T) -> T:
    """Return what the first matching key of rank_pattern or alpha_pattern says of a path.

    Raises
    ------
    re.error
        If a key is no regular expression.
    """
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def is_saved(name: str, saved: Collection[str]) -> bool:
    """Tell whether a tensor lies in a module that modules_to_save names, by the end of the module's path."""
    pieces = name.split(".")
    return any(".".join(pieces[:stop]).endswith(tuple(saved)) for stop in range(1, len(pieces)))


def saved_alike(path: str, modules: Iterable[str]) -> str:
    """Name a module that PEFT would save whole too if modules_to_save listed this path; "" if there is none."""
    return min((module for module in modules if module != path and module.endswith(path)), default="")


def lies_inside(path: str, saved: str) -> bool:
    """Tell whether PEFT passes over a target because modules_to_save lists it, or a module around it."""
    return _fits(rf"(|.*\.){saved}(|\..*)", path)


def own_parameters(module: str, listed: Iterable[str]) -> set[str]:
    """Return which of a module's own parameters target_parameters lists: by full name, or by its end."""
    found = set()
    for name in listed:
        owner, _, leaf = name.rpartition(".")
        bare = not owner and module.endswith("experts")  # as PEFT rewrites the targets of older expert checkpoints
        if bare or (owner and ends_in(module, {owner})):
            found.add(leaf)
    return found


def is_parameter(path: str, config: Config) -> bool:
    """Tell whether factors of this name are those of a parameter that target_parameters lists, not of a module."""
    module, _, leaf = path.rpartition(".")
    return leaf in own_parameters(module, config.get("target_parameters") or [])


def list_names(found: object) -> list[str]:
    """Return a field of a config that may hold a list of names; of anything else none."""
    return [str(name) for name in found] if isinstance(found, list) else []


def list_unloaded(adapter: AdapterIndex) -> list[str]:
    """Name the factors and whole tensors that ``adapter_config.json`` makes PEFT pass over.

    Returns
    -------
    list of str
        One sentence's worth for each, empty where the config covers all.
    """
    config = adapter.config
    gone = [path for path in adapter.modules if not is_loaded(path, config)]
    saved = list_names(config.get("modules_to_save"))
    gone += [name for name in adapter.full if not is_saved(name, saved)]
    return [f"adapter_config.json leaves out '{path}'" for path in gone]


def is_loaded(path: str, config: Config) -> bool:
    """Tell whether PEFT gives a module factors: a listed parameter, or a target that nothing takes away."""
    if ends_in(path, list_names(config.get("target_parameters"))):
        return True
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if isinstance(excluded, str) and excluded:
        if _fits(excluded, path):
            return False
    elif ends_in(path, list_names(excluded)):
        return False
    if any(lies_inside(path, name) for name in list_names(config.get("modules_to_save"))):
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or _fits(targets, path)
    names = list_names(targets)
    return path in names or (ends_in(path, names) and _in_layers(path, config))


def _in_layers(path: str, config: Config) -> bool:
    """Tell whether layers_to_transform keeps a module that target_modules names by its end."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    names = [patterns] if isinstance(patterns, str) and patterns else list_names(patterns)
    rules = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    number = next((int(found["layer"]) for rule in rules if (found := re.match(rule, path))), None)
    return number in (layers if isinstance(layers, list) else [layers])


def _fits(pattern: str, path: str) -> bool:
    try:
        return bool(re.fullmatch(pattern, path))
    except (re.error, RecursionError, OverflowError):
        return False
