"""The class of each row: a column of them, or the comparison of a column with a number."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.training import DataOptions

RULE = re.compile(r"(?P<field>.+?)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<number>[-+]?[0-9.]+(e[-+]?[0-9]+)?)", re.I)
SIGNS = {
    ">": (operator.gt, "<="),
    ">=": (operator.ge, "<"),
    "<": (operator.lt, ">="),
    "<=": (operator.le, ">"),
    "==": (operator.eq, "!="),
    "!=": (operator.ne, "=="),
}


class Columns(Protocol):
    """Columns of equal length by name; ``features`` may declare a column's classes (datasets.Dataset)."""

    @property
    def features(self) -> Mapping[str, object]:
        """What is declared of each column."""

    def __len__(self) -> int:
        """Count the rows."""

    def __getitem__(self, name: str) -> Iterable[Any]:
        """Return one column's values, of whatever kind a file holds."""


def find_label(options: DataOptions) -> str:
    """Return the column that classes are made of.

    Examples
    --------
    >>> find_label(DataOptions(label="score>=3"))
    'score'
    """
    rule = RULE.fullmatch(options.label)
    return rule["field"] if rule else options.label


def read_classes(
    found: Columns, options: DataOptions, source: str, *, names: Sequence[str] = ()
) -> tuple[list[int], tuple[str, ...]]:
    """Return each row's class id, and the classes in their order.

    Parameters
    ----------
    found : Columns
        With the one that ``find_label`` names.
    options : DataOptions
    source : str
        What they were read from, for errors.
    names : sequence of str
        The classes of other data, in their order.

    Raises
    ------
    CheckpointError
        If a row has no class, or one that is not in ``names``.
    OptionError
        If ``label`` compares with what is no number.
    """
    rule = RULE.fullmatch(options.label)
    kinds, own = _compare(found[rule["field"]], rule, source) if rule else _name_classes(found, options.label, source)
    known = tuple(names) or own
    return _number(kinds, known, source), known


def _compare(values: Iterable[Any], rule: re.Match[str], ref: str) -> tuple[list[str], tuple[str, ...]]:
    """Return each row's class by a comparison, and both classes: false, true."""
    field, number = rule["field"], rule["number"]
    test, opposite = SIGNS[rule["sign"]]
    names = (f"{field}{opposite}{number}", f"{field}{rule['sign']}{number}")
    try:
        wanted = float(number)
    except ValueError as cause:
        message = f"--label is '{rule.string}': '{number}' is not a number."
        raise OptionError(message) from cause
    kinds = []
    for row, value in enumerate(values, 1):
        try:
            size = float(value)
        except (TypeError, ValueError):
            size = math.nan
        if math.isnan(size):
            message = (
                f"Row {row} of '{ref}' has {value!r} under '{field}', expected a number for --label {rule.string}."
            )
            raise CheckpointError(message)
        kinds.append(names[test(size, wanted)])
    return kinds, names


def _name_classes(found: Columns, label: str, ref: str) -> tuple[list[str], tuple[str, ...]]:
    """Return each row's class as text, and all classes in order."""
    values, declared = list(found[label]), getattr(found.features[label], "names", None)
    if declared:
        values = [declared[value] if value is not None and value >= 0 else None for value in values]
    for row, value in enumerate(values, 1):
        if not isinstance(value, str | int | float) or (isinstance(value, str) and not value.strip()):
            held = "none" if value is None or isinstance(value, str) else type(value).__name__
            message = f"Row {row} of '{ref}' has {held} under '{label}', expected a class: repair or remove the row."
            raise CheckpointError(message)
    kinds = [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) for value in values]
    return kinds, tuple(declared or _sort(set(kinds), label, ref))


def _sort(kinds: set[str], label: str, ref: str) -> list[str]:
    """Sort classes by number where all are whole numbers; refuse measurements, which are no classes."""
    try:
        sizes = {kind: float(kind) for kind in kinds}
    except ValueError:
        return sorted(kinds)
    if all(size.is_integer() for size in sizes.values()):
        return sorted(kinds, key=lambda kind: (sizes[kind], kind))
    message = (
        f"'{ref}' has numbers with fractions under '{label}', expected classes: compare them with a number, such as "
        f"--label '{label}>0'."
    )
    raise CheckpointError(message)


def _number(kinds: Sequence[str], names: Sequence[str], ref: str) -> list[int]:
    """Return class ids; every class must be known."""
    ids = {name: number for number, name in enumerate(names)}
    for row, kind in enumerate(kinds, 1):
        if kind not in ids:
            known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            message = f"Row {row} of '{ref}' has the class '{kind}', which the training data lacks: it has {known}."
            raise CheckpointError(message)
    return [ids[kind] for kind in kinds]
