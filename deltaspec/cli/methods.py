"""The flags of every training method's options: which method takes which, and what its default is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from deltaspec.cli.flags import TYPES, flags
from deltaspec.errors import OptionError
from deltaspec.options.methods import METHOD_OPTIONS
from deltaspec.options.option import flag_of
from deltaspec.options.training import TargetOptions

F = TypeVar("F", bound=Callable[..., Any])
FIELDS: dict[str, dict[str, Field[Any]]] = {
    method: {item.name: item for item in fields(kind) if item.type in TYPES} for method, kind in METHOD_OPTIONS.items()
}
"""Method → the fields of its options that a flag can say; rank patterns and the like are for Python."""
TAKEN = {method: {name: TYPES[str(item.type)] for name, item in known.items()} for method, known in FIELDS.items()}
"""Method → its flags, and the type of each."""
HELP = {name: "" for known in FIELDS.values() for name in known}
WORDS = {"yes": True, "no": False}


def _takers(name: str) -> dict[str, Field[Any]]:
    return {method: known[name] for method, known in FIELDS.items() if name in known}


def _describe(name: str) -> str:
    """Say what a flag means, method by method where that differs, and each one's default."""
    groups: dict[str, list[str]] = {}
    for method, item in _takers(name).items():
        groups.setdefault(item.metadata["about"], []).append(f"{method} {_word(item.default)}")
    return " ".join(f"{about} [{', '.join(takers)}]" for about, takers in groups.items())


def _word(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


HELP.update({name: _describe(name) for name in HELP})
"""Flag → its help."""


def method_options(function: F) -> F:
    """Add --method, --targets, --depths and --split, and the flags of every method's options.

    Flags that the user leaves out are not set: defaults are those of the method's options.
    """
    for name, text in reversed(HELP.items()):
        takers = _takers(name)
        kinds = {TYPES[str(item.type)] for item in takers.values()}
        flag = flag_of(next(iter(takers.values())))
        pair = f"/--no-{flag[2:]}" if kinds == {bool} else ""
        kind = None if pair else next(iter(kinds)) if len(kinds) == 1 else str  # yes or no here, a word there: a word
        function = click.option(flag + pair, name, type=kind, default=None, help=text)(function)
    function = flags(TargetOptions)(function)
    text = f"How MODEL is trained: {', '.join(METHOD_OPTIONS)}."
    return click.option("--method", default="lora", show_default=True, metavar="METHOD", help=text)(function)


def parse_method(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Take --method and its flags out of a command's arguments.

    Parameters
    ----------
    given : dict
        The command's arguments by name; those of methods are removed.

    Returns
    -------
    str, dict
        The method's name, and the fields of its options that the user set.

    Raises
    ------
    OptionError
        If there is no such method, it has no such option, or a value is of another type.
    """
    method = given.pop("method")
    chosen = {name: value for name in HELP if (value := given.pop(name, None)) is not None}
    if method not in TAKEN:
        message = f"--method is '{method}': expected one of {', '.join(TAKEN)}."
        raise OptionError(message)
    known = TAKEN[method]
    for name in chosen:
        flag = flag_of(next(iter(_takers(name).values())))
        if name not in known:
            takes = f"it takes {', '.join(map(flag_of, FIELDS[method].values()))}" if known else "it has no options"
            message = f"{flag} does not belong to --method {method}: {takes}."
            raise OptionError(message)
        if known[name] is bool and isinstance(chosen[name], str):
            if chosen[name] not in WORDS:
                message = f"{flag} is '{chosen[name]}': --method {method} expects yes or no."
                raise OptionError(message)
            chosen[name] = WORDS[chosen[name]]
    return method, chosen
