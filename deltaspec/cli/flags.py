"""Options dataclasses → flags of a command, and a command's arguments → options dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import click

from deltaspec.options.option import flag_of, option

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


@dataclass(frozen=True, slots=True)
class Output:
    """How a command speaks."""

    as_json: bool = option(False, "Print JSON instead of text.", flag="--json")
    quiet: bool = option(False, "Show no progress.")


@dataclass(frozen=True, slots=True)
class Writing(Output):
    """How a command that writes a folder or file speaks and writes."""

    overwrite: bool = option(False, "Replace what is there, if it is of the kind that this command writes.")


def flags(kind: type, *names: str, defaults: Mapping[str, Any] | None = None) -> Callable[[F], F]:
    """Add a flag for each field of an options dataclass, with the field's help and default.

    Parameters
    ----------
    kind : dataclass
        Its fields are str, int, float, bool or tuples of str, which the command line takes as one text with commas,
        or one by one where the flag is repeated.
    *names : str
        Only these fields; without any, all.
    defaults : mapping, optional
        What a command takes by default instead of the field's own default.
    """

    def add(function: F) -> F:
        for item in reversed(fields(kind)):
            if not item.metadata or (names and item.name not in names):
                continue
            about, flag = item.metadata["about"], flag_of(item)
            default = (defaults or {}).get(item.name, item.default)
            if isinstance(default, bool):
                spelled = f"{flag}/--no-{flag[2:]}" if default else flag
                function = click.option(spelled, item.name, is_flag=True, default=default, help=about)(function)
                continue
            repeated = bool(item.metadata.get("repeated"))
            default = ",".join(default) if isinstance(default, tuple) and not repeated else default
            function = click.option(
                flag,
                item.name,
                multiple=repeated,
                type=TYPES.get(str(item.type), str),
                default=default,
                show_default=default not in ("", ()),
                metavar=item.metadata["metavar"] or None,
                help=about,
            )(function)
        return function

    return add


def take(kind: type[T], given: dict[str, Any]) -> T:
    """Take the fields of an options dataclass out of a command's arguments, and make it of them.

    Parameters
    ----------
    kind : dataclass
    given : dict
        The command's arguments by name; those that are fields are removed. Fields that are not there keep their
        defaults.

    Raises
    ------
    OptionError
        If a value makes no sense.
    """
    values = {item.name: given.pop(item.name) for item in fields(kind) if item.name in given}  # type: ignore[arg-type]
    for item in fields(kind):  # type: ignore[arg-type]
        if isinstance(values.get(item.name), str) and str(item.type).startswith("tuple"):
            values[item.name] = tuple(values[item.name].split(","))
    return kind(**values)
