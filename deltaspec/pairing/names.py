"""Which tensor of the tuned model is which of the base: by name, up to one difference in prefix."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

FEW = 8  # a rest that more names share says nothing


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10.

    >>> sorted(["layers.10", "layers.2"], key=natural_order)
    ['layers.2', 'layers.10']
    """
    # Eighteen digits at most: int() refuses very long numbers, and names are untrusted.
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"([0-9]{1,18})", name)]


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name into prefix and a rest of at least two components; the whole name first."""
    yield "", name
    pieces = name.split(".")
    for i in range(1, min(len(pieces) - 1, 12)):
        yield ".".join(pieces[:i]) + ".", ".".join(pieces[i:])


def _numbers(prefix: str) -> list[str]:
    return [piece for piece in prefix.split(".") if piece.isdecimal()]


def align_names(base: Iterable[str], tuned: Iterable[str]) -> tuple[dict[str, str], str]:
    """Map base names to tuned names.

    Equal names pair. Where one change of prefix (``bert.`` for nothing, ``model.`` for ``model.language_model.``)
    pairs more tensors than equality does, the rest pair under it. A change never touches a number, so no layer is
    taken for another.

    Returns
    -------
    mapping : dict
        Base name → tuned name.
    note : str
        The prefix change in words; "" if none was needed.

    Examples
    --------
    >>> mapping, note = align_names(["encoder.0.weight", "encoder.1.weight"],
    ...                             ["bert.encoder.0.weight", "bert.encoder.1.weight"])
    >>> mapping["encoder.0.weight"], note
    ('bert.encoder.0.weight', "names in the tuned model have 'bert.' before those of the base")
    """
    base, tuned = set(base), set(tuned)
    mapping = {name: name for name in base & tuned}
    left, right = base - tuned, tuned - base
    by_rest: defaultdict[str, list[str]] = defaultdict(list)
    for name in left:
        for prefix, rest in _splits(name):
            by_rest[rest].append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name in right:
        # The longest rest that any base name ends in; one vote a name, so that experts cost no more than layers.
        new, rest = next(((p, r) for p, r in _splits(name) if r in by_rest), ("", ""))
        votes.update((old, new) for old in by_rest.get(rest, ())[:FEW] if _numbers(old) == _numbers(new))
    if not votes:
        return mapping, ""
    (old, new), count = max(votes.items(), key=lambda item: (item[1], -len(item[0][0]) - len(item[0][1]), item[0]))
    if count <= len(mapping):
        return mapping, ""
    for name in left:
        renamed = new + name.removeprefix(old)
        if name.startswith(old) and renamed in right:
            mapping[name] = renamed
    return mapping, f"names in the tuned model {_describe(old, new)}"


def _describe(old: str, new: str) -> str:
    """Say how a prefix differs."""
    if not old or not new:
        return f"have '{new}' before those of the base" if new else f"lack the '{old}' of those of the base"
    return f"begin with '{new}' where those of the base begin with '{old}'"
