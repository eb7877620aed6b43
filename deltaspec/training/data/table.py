"""Texts and their classes, from the columns of a data set."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.training import DataOptions
from deltaspec.training.data.classes import Columns, find_label, read_classes


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


def list_fields(options: DataOptions) -> list[str]:
    """List the columns that texts and classes are made of.

    Raises
    ------
    OptionError
        If ``text`` cannot be understood.

    Examples
    --------
    >>> list_fields(DataOptions(text="{question} {answer}", label="score>=3"))
    ['question', 'answer', 'score']
    """
    label = [find_label(options)] if options.task == "classification" else []
    return [field for _, field in _parse_template(options.text) if field] + label


def make_table(found: Columns, options: DataOptions, *, source: str, names: Sequence[str] = ()) -> Table:
    """Make texts, and classes where the task has them, from columns.

    Parameters
    ----------
    found : Columns
        Those that ``list_fields`` names.
    options : DataOptions
        ``text`` is a column, or a template of columns, ``{question} {answer}``, in which backslash n is a new line.
        ``label`` is a column, or the comparison of one with a number: ``2>0``.
    source : str
        What they were read from, for errors.
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
        If there is a row without class, one class only, or one not in ``names``.
    OptionError
        If ``text`` or ``label`` cannot be understood.
    """
    pieces, ref = _parse_template(options.text), source
    classes = options.task == "classification"
    labels, known = read_classes(found, options, ref, names=names) if classes else ([], ())
    texts = _fill(found, pieces, ref)
    kept = [place for place, text in enumerate(texts) if text.strip()]
    table = Table(ref, texts, list(range(1, len(texts) + 1)), labels, known)
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


def _fill(found: Columns, pieces: Sequence[tuple[str, str]], ref: str) -> list[str]:
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
