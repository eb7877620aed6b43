"""Names of the tuned side as the user maps them, before anything is paired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from deltaspec.architecture.peft_names import PREFIX
from deltaspec.errors import OptionError
from deltaspec.options import PairOptions
from deltaspec.pairing.flattened import take_component
from deltaspec.types import AdapterIndex, Checkpoint

T = TypeVar("T")
Side = TypeVar("Side", Checkpoint, AdapterIndex, Checkpoint | AdapterIndex)


def choose_names(sides: Sequence[Side], pairing: PairOptions) -> list[Side]:
    """Take the component that is asked for, and map names.

    Raises
    ------
    OptionError
        If there is no such component, or a map fits nothing.
    """
    return map_names(take_component(sides, pairing.component), pairing.map)


def map_names(sides: Sequence[Side], maps: Sequence[str]) -> list[Side]:
    """Replace prefixes, or whole names, of tensors and modules.

    Parameters
    ----------
    sides : sequence of Checkpoint or AdapterIndex
    maps : sequence of str
        ``OLD=NEW``, of which the first that fits a name counts; prefixes end at dots.

    Raises
    ------
    OptionError
        If one fits no name of any side, or two names become one.
    """
    if not maps:
        return list(sides)
    renamer = _Renamer(maps)
    found = [_rename_side(side, renamer) for side in sides]
    example = next((name for side in sides for name in _list_names(side)), "none")
    renamer.refuse_idle(", ".join(side.ref for side in sides), example)
    return found


def map_keys(tensors: Mapping[str, T], maps: Sequence[str], ref: str) -> dict[str, T]:
    """Replace prefixes, or whole names, of the keys of an adapter that is not plain LoRA, behind PEFT's own prefix.

    Raises
    ------
    OptionError
        As of ``map_names``.
    """
    renamer = _Renamer(maps)

    def renamed(key: str) -> str:
        inner = key.removeprefix(PREFIX)
        return key[: len(key) - len(inner)] + renamer(inner)

    found = _rename(tensors, renamed, ref)
    renamer.refuse_idle(ref, next((key.removeprefix(PREFIX) for key in tensors), "none"))
    return found


def _parse(pair: str) -> tuple[str, str]:
    old, _, new = pair.partition("=")
    return old.removesuffix("."), new.removesuffix(".")


class _Renamer:
    """Renames by rules, and remembers which of them were of use."""

    def __init__(self, maps: Sequence[str]) -> None:
        self.maps, self.rules = maps, [_parse(pair) for pair in maps]
        self.used: set[int] = set()

    def __call__(self, name: str) -> str:
        for number, (old, new) in enumerate(self.rules):
            if old and name != old and not name.startswith(f"{old}."):
                continue
            rest = name[len(old) :].removeprefix(".")
            self.used.add(number)
            return ".".join(filter(None, (new, rest)))
        return name

    def refuse_idle(self, ref: str, example: str) -> None:
        """Stop where a map was of no use."""
        if idle := [pair for number, pair in enumerate(self.maps) if number not in self.used]:
            message = f"--map '{idle[0]}' fits no name of {ref}: expected the beginning of one, such as '{example}'."
            raise OptionError(message)

    def module(self, path: str) -> str:
        """Rename a module's path, also by what names its weight."""
        renamed = self(path)
        return renamed if renamed != path else self(f"{path}.weight").removesuffix(".weight")


def _rename_side(side: Side, renamer: _Renamer) -> Side:
    if isinstance(side, Checkpoint):
        tensors = _rename(side.tensors, renamer, side.ref)
        tensors = {
            name: replace(spec, name=name, wrapped=spec.stored_name) if name != spec.name else spec
            for name, spec in tensors.items()
        }
        return replace(side, tensors=tensors, aliases={renamer(a): renamer(name) for a, name in side.aliases.items()})
    modules = _rename(side.modules, renamer.module, side.ref)
    biases = _rename(side.biases, renamer.module, side.ref)
    return replace(side, modules=modules, biases=biases, full=_rename(side.full, renamer, side.ref))


def _rename(found: Mapping[str, T], renamer: Callable[[str], str], ref: str) -> dict[str, T]:
    renamed: dict[str, T] = {}
    for name, value in found.items():
        if (new := renamer(name)) in renamed:
            message = f"--map makes two names of {ref} one, '{new}': map fewer of them."
            raise OptionError(message)
        renamed[new] = value
    return renamed


def _list_names(side: Checkpoint | AdapterIndex) -> Iterable[str]:
    return side.tensors if isinstance(side, Checkpoint) else (*side.modules, *side.full)
