"""Whether PEFT will load all that an adapter's files hold: what its config names, by PEFT's own rules."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from deltaspec.types import AdapterIndex


def left_out(adapter: AdapterIndex) -> list[str]:
    """Name the factors and whole tensors that ``adapter_config.json`` makes PEFT pass over.

    Parameters
    ----------
    adapter : AdapterIndex

    Returns
    -------
    list of str
        One sentence's worth for each, empty where the config covers all.
    """
    config = adapter.config
    gone = [path for path in adapter.modules if not _is_loaded(path, config)]
    saved = _names(config.get("modules_to_save"))
    gone += [name for name in adapter.full if not _is_saved(name, saved)]
    return [f"adapter_config.json leaves out '{path}'" for path in gone]


def _is_loaded(path: str, config: dict[str, Any]) -> bool:
    """Tell whether PEFT gives a module factors: a listed parameter, or a target that nothing takes away."""
    if _ends_in(path, _names(config.get("target_parameters"))):
        return True
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if isinstance(excluded, str) and excluded:
        if _fits(excluded, path):
            return False
    elif _ends_in(path, _names(excluded)):
        return False
    if any(_fits(rf"(|.*\.){name}(|\..*)", path) for name in _names(config.get("modules_to_save"))):
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or _fits(targets, path)
    return path in _names(targets) or (_ends_in(path, _names(targets)) and _in_layers(path, config))


def _in_layers(path: str, config: dict[str, Any]) -> bool:
    """Tell whether layers_to_transform keeps a module that target_modules names by its end."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    names = [patterns] if isinstance(patterns, str) and patterns else _names(patterns)
    rules = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    number = next((int(found["layer"]) for rule in rules if (found := re.match(rule, path))), None)
    return number in (layers if isinstance(layers, list) else [layers])


def _is_saved(name: str, saved: Collection[str]) -> bool:
    """Tell whether a tensor lies in a module that modules_to_save names, by the end of the module's path."""
    pieces = name.split(".")
    return any(".".join(pieces[:stop]).endswith(tuple(saved)) for stop in range(1, len(pieces)))


def _ends_in(path: str, names: Collection[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _names(found: object) -> list[str]:
    return [str(name) for name in found] if isinstance(found, list) else []


def _fits(pattern: str, path: str) -> bool:
    try:
        return bool(re.fullmatch(pattern, path))
    except (re.error, RecursionError, OverflowError):
        return False
