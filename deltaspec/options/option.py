"""One field of an options dataclass, with all that is said about it: default, help, and the flag's spelling.

The command line builds its flags from these fields, the manual its reference, and ``help()`` its list of parameters.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, field, fields
from inspect import cleandoc
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: T, about: str, *, metavar: str = "", flag: str = "", repeated: bool = False) -> T:
    """Declare a field of an options dataclass.

    Parameters
    ----------
    default : T
        Immutable.
    about : str
        What it decides, in whole sentences, with the values that it takes.
    metavar : str
        What stands for its value in a command's help; "" leaves that to the type.
    flag : str
        Its spelling on the command line; "" is the field's name with dashes.
    repeated : bool
        Of a tuple: given once for each of its elements, instead of as one text with commas.
    """
    return field(default=default, metadata={"about": about, "metavar": metavar, "flag": flag, "repeated": repeated})


def flag_of(item: Field[Any]) -> str:
    """Spell a field as a flag: ``--max-rank``."""
    spelled: str = item.metadata.get("flag") or f"--{item.name.replace('_', '-')}"
    return spelled


def documented(kind: type[T]) -> type[T]:
    """Add a numpydoc list of its fields to the docstring of an options dataclass, before its examples."""
    said, examples, rest = cleandoc(str(kind.__doc__)).partition("\n\nExamples\n")
    lines = [said, "", "Parameters", "----------"]
    for item in fields(kind):  # type: ignore[arg-type]
        default = "" if item.default is MISSING else f", default {item.default!r}"
        lines.append(f"{item.name} : {item.type}{default}")
        lines += [f"    {item.metadata['about']}"] if "about" in item.metadata else []
    kind.__doc__ = "\n".join(lines) + examples + rest
    return kind
