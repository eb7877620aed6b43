"""Texts and their classes, from the columns of a data set."""

from __future__ import annotations

import math
import operator
import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.training import DataOptions
from deltaspec.training.data.rows import read_rows

RULE = re.compile(r"(?P<field>.+?)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<number>[-+]?[0-9.]+(e[-+]?[0-9]+)?)", re.I)
SIGNS = {
    ">": (operator.gt, "<="),
    ">=": (operator.ge, "<"),
    "<": (operator.lt, ">="),
    "<=": (operator.le, ">"),
    "==": (operator.eq, "!="),
    "!=": (operator.ne, "=="),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Texts, each with its row in the source (from 1) and its class id; without classes ``labels`` is empty.

    ``names`` are the classes in their order, ``skipped`` is how many rows had no text.
    """

    source: str
    texts: list[str]
    rows: list[int]
    labels: list[int]
    names: tuple[str, ...] = ()
    skipped: int = 0

    def take(self, places: Sequence[int]) -> Table:
        """Return some of the texts, in this order."""
        labels = [self.labels[place] for place in places] if self.labels else []
        return replace(self, texts=[self.texts[p] for p in places], rows=[self.rows[p] for p in places], labels=labels)


def read_table(ref: str, options: DataOptions, *, names: Sequence[str] = ()) -> Table:
    """Read the texts of a file or hub data set, and their classes where the task has them.

    Parameters
    ----------
    ref : str
        As read_rows takes it.
    options : DataOptions
        ``text`` is a column, or a template of columns, ``{question} {answer}``, in which backslash n is a new line.
        ``label`` is a column, or the comparison of one with a number: ``2>0``.
    names : sequence of str
        The classes of other data, in their order.

    Returns
    -------
    Table
        Rows without text left out. Classes are sorted, as numbers where all are; a comparison's are false, true;
        those that a hub data set declares keep their order.

    Raises
    ------
    CheckpointError
        If it cannot be read, lacks a column, has a row without class, one class only, or one not in ``names``.
    OptionError
        If ``text`` or ``label`` cannot be understood.
    """
    pieces = _parse_template(options.text)
    classes = options.task == "classification"
    rule = RULE.fullmatch(options.label) if classes else None
    label = rule["field"] if rule else options.label
    found = read_rows(ref, [field for _, field in pieces if field] + [label] * classes)
    labels: list[int] = []
    own: tuple[str, ...] = ()
    if classes:
        kinds, own = _compare(found[label], rule, ref) if rule else _name_classes(found, label, ref)
        labels = _number(kinds, tuple(names) or own, ref)
    texts = _fill(found, pieces, ref)
    kept = [place for place, text in enumerate(texts) if text.strip()]
    table = Table(ref, texts, list(range(1, len(texts) + 1)), labels, (tuple(names) or own) if classes else ())
    table = replace(table.take(_draw(kept, options)), skipped=len(texts) - len(kept))
    if classes and not names and len(set(table.labels)) < 2:
        held = f"one class only, '{table.names[table.labels[0]]}'" if table.labels else "no text in it"
        message = f"'{ref}' has {held}: classification needs texts of two classes; check --text and --label."
        raise CheckpointError(message)
    return table


def split_table(table: Table, share: float, *, seed: int) -> tuple[Table, Table]:
    """Part texts into those for training and a held-out share, drawn by seed, in the order they stand in.

    Parameters
    ----------
    table : Table
    share : float, 0 ≤ share < 1
        Of each class's different texts, to the nearest one, but one at least held out where the class has two, and one
        left to train. Equal texts, but for case and spaces, stay on one side; they count by the first one's class.
    seed : int

    Raises
    ------
    CheckpointError
        If there are too few texts for it.
    """
    equal: defaultdict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(table.texts):
        equal[" ".join(text.casefold().split())].append(place)
    groups: defaultdict[int, list[list[int]]] = defaultdict(list)
    for places in equal.values():
        groups[table.labels[places[0]] if table.labels else 0].append(places)
    generator = torch.Generator().manual_seed(seed)
    held: set[int] = set()
    for label in sorted(groups) if share else ():
        texts = groups[label]
        count = min(len(texts) - 1, max(1, round(share * len(texts))))
        for number in torch.randperm(len(texts), generator=generator)[:count].tolist():
            held.update(texts[number])
    if share and not held:
        message = (
            f"'{table.source}' has too few texts ({len(equal)} different ones) to hold out {share:.0%} of them "
            "for evaluation: pass --holdout 0, or a file of its own for it."
        )
        raise CheckpointError(message)
    return table.take([p for p in range(len(table.texts)) if p not in held]), table.take(sorted(held))


def _draw(places: list[int], options: DataOptions) -> list[int]:
    """Return ``limit`` places drawn by seed, in their order: files are often sorted by class."""
    if not options.limit or len(places) <= options.limit:
        return places
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randperm(len(places), generator=generator)[: options.limit]
    return [places[number] for number in sorted(drawn.tolist())]


def _parse_template(text: str) -> list[tuple[str, str]]:
    """Split into literal text and the field after it ("" at the end); a plain name is a field."""
    if "{" not in text:
        return [("", text)]
    try:
        parsed = list(string.Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as cause:
        message = f"--text is '{text}' ({cause}): expected a column, or a template such as '{{question}} {{answer}}'."
        raise OptionError(message) from cause
    if any(spec or conversion or field == "" for _, field, spec, conversion in parsed) or not any(
        field for _, field, _, _ in parsed
    ):
        message = f"--text is '{text}': expected names of columns alone in braces, such as '{{question}} {{answer}}'."
        raise OptionError(message)
    return [(literal, field or "") for literal, field, _, _ in parsed]


def _fill(found: Any, pieces: Sequence[tuple[str, str]], ref: str) -> list[str]:
    """Return a text for each row; an empty one where any of its columns is."""
    columns = {field: list(found[field]) for _, field in pieces if field}
    for field, values in columns.items():
        row = next((n for n, value in enumerate(values, 1) if not isinstance(value, str | int | float | None)), 0)
        if row:
            message = (
                f"Row {row} of '{ref}' has {type(values[row - 1]).__name__} under '{field}', expected a text: "
                "pass --text with another column."
            )
            raise CheckpointError(message)
    texts = []
    for row in range(len(found)):
        held = {field: "" if values[row] is None else str(values[row]) for field, values in columns.items()}
        whole = all(value.strip() for value in held.values())
        texts.append("".join(literal + held.get(field, "") for literal, field in pieces) if whole else "")
    return texts


def _compare(values: Sequence[Any], rule: re.Match[str], ref: str) -> tuple[list[str], tuple[str, ...]]:
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


def _name_classes(found: Any, label: str, ref: str) -> tuple[list[str], tuple[str, ...]]:
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
