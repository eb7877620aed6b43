"""Which of the dictionaries inside a pickled file holds the weights; what lies beside it is named, never dropped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.io.foreign_marks import describe_module

MARK = "::"  # FILE::STATE
TOP = "."
DEPTH = 32  # dictionaries inside dictionaries
LEFTOVERS = re.compile(  # keys of what trainers keep beside weights
    r".*(optim|sched|scaler|rng|random_state|callback|hyper_?param|hparam).*|(.*_)?opt(_.*)?|amp|args|loops|sampler",
    re.IGNORECASE,
)
AVERAGES = re.compile(r"(.*[_-])?(ema|swa|shadow|averaged?|polyak)([_-].*)?", re.IGNORECASE)


@dataclass(slots=True)
class States:
    """The dictionaries from names to tensors inside a file, by the path of keys that leads to each ("" at the top).

    ``unnamed`` are the paths of tensors that lie in lists, or under keys that are no names.
    """

    named: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)


def split_state(ref: str | Path) -> tuple[str | Path, str]:
    """Split ``FILE::STATE``, the name of one dictionary inside a pickled file; what exists under its whole name is one.

    >>> split_state("last.pt::unet"), split_state("last.pt")
    (('last.pt', 'unet'), ('last.pt', ''))
    """
    file, mark, state = str(ref).rpartition(MARK)
    whole = not mark or not state or not file or Path(ref).expanduser().exists()
    return (ref, "") if whole else (file, state)


def find_states(loaded: object) -> States:
    """Walk through what a file holds; training leftovers are passed over."""
    found = States(unnamed=[""] if isinstance(loaded, Tensor) else [])
    _walk(loaded, (), found, set())
    return found


def _walk(node: object, path: tuple[str, ...], found: States, seen: set[int]) -> None:
    if id(node) in seen or len(path) > DEPTH:
        return
    seen.add(id(node))  # a pickle may contain itself, or one dictionary twice
    here = ".".join(path)
    for key, value in _items(node):
        if isinstance(value, Tensor):
            if isinstance(node, Mapping) and isinstance(key, str):
                found.named.setdefault(here, {})[key] = value.detach()
            elif here not in found.unnamed:
                found.unnamed.append(here)
        elif not LEFTOVERS.fullmatch(str(key)):
            _walk(value, (*path, str(key)), found, seen)


def _items(node: object) -> Iterator[tuple[object, object]]:
    if isinstance(node, Mapping):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def choose_state(states: States, wanted: str, *, file: Path) -> str:
    """Choose the dictionary that is meant: the one asked for, else the only one that holds weights.

    Parameters
    ----------
    states : States
    wanted : str
        Its path, or the beginning of it, "." at the top; "" where nothing is asked for.
    file : Path
        For errors.

    Raises
    ------
    CheckpointError
        If there are several, which are named, or none of the name.
    """
    named = states.named
    held = {path: tensors for path, tensors in named.items() if _holds_weights(tensors)} or named
    if wanted:
        place = "" if wanted == TOP else wanted
        inner = [path for path in held if path == place] or [path for path in held if path.startswith(f"{place}.")]
        if len(inner) != 1:
            message = f"Cannot find '{wanted}' in '{file}': it holds tensors under {_list(inner or held)}; name one."
            raise CheckpointError(message)
        return inner[0]
    current = [path for path in held if not is_average(path)] or list(held)
    if what := describe_module(f"{path}.{name}".lstrip(".") for path in current for name in held[path]):
        message = f"Cannot use '{file}': it is {what}."
        raise CheckpointError(message)
    if len(current) > 1:
        message = (
            f"Cannot tell which weights of '{file}' are meant: it holds tensors under {_list(current)}; name one, as "
            f"in '{file.name}{MARK}{current[0] or TOP}'."
        )
        raise CheckpointError(message)
    if not current and states.unnamed:
        message = (
            f"Cannot use '{file}': it holds tensors without names, and weights need theirs; save a dictionary from "
            "names to tensors."
        )
        raise CheckpointError(message)
    return current[0] if current else ""


def list_left(states: States, chosen: str, *, file: Path) -> list[str]:
    """Say what of a file is left out beside the dictionary that was chosen without being asked for."""
    notes = [
        f"'{file.name}' also holds '{path}', an average of the weights, which is left out: name "
        f"{file.name}{MARK}{path} to read it"
        for path, tensors in states.named.items()
        if path != chosen and is_average(path) and _holds_weights(tensors)
    ]
    if lists := states.unnamed:
        notes.append(f"'{file.name}' also holds tensors without names under {_list(lists)}, which are left out")
    return notes


def is_average(path: str) -> bool:
    """Tell whether a dictionary is called an average of weights (EMA, SWA)."""
    return any(AVERAGES.fullmatch(key) for key in path.split("."))


def _holds_weights(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether there is more than a trainer's counters and the state of its random numbers."""
    return any(tensor.numel() > 1 and not LEFTOVERS.fullmatch(name) for name, tensor in tensors.items())


def _list(paths: Mapping[str, object] | list[str]) -> str:
    shown = [f"'{path}'" if path else f"'{TOP}' (the top)" for path in paths]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
