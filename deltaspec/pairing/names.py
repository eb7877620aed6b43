"""Which tensor of the tuned model is which of the base: by name, up to changes of prefix that names prove.

A change of prefix (``bert.`` for nothing, ``model.`` for ``model.language_model.``) is believed where

- it pairs a majority of the names that begin so, on the side where fewer do;
- it pairs more of them than pair already, by equality or another change;
- it pairs whole blocks, two or more names behind one number, or more names than all before it;
- no other change pairs the same tensors otherwise, as many, in the same shapes, by names as long: that is a tie, and
  refused.

It never touches a number, so no layer is taken for another; and nothing depends on the order of the names.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from deltaspec.errors import PairingError
from deltaspec.types import Shape

FEW = 8  # a rest that more names share says nothing
TRIED = 16
Names = Mapping[str, Shape | None] | Iterable[str]
"""Names, with the shapes of their tensors where these are known."""
Shapes = dict[str, Shape | None]


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10.

    >>> sorted(["layers.10", "layers.2"], key=natural_order)
    ['layers.2', 'layers.10']
    """
    # Eighteen digits at most: int() refuses very long numbers, and names are untrusted.
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"([0-9]{1,18})", name)]


def block_of(name: str) -> str:
    """Return the path of the block that a tensor lies in, up to its first number; "" outside the blocks.

    >>> block_of("model.layers.3.mlp.experts.0.up_proj.weight"), block_of("lm_head.weight")
    ('model.layers.3', '')
    """
    pieces = name.split(".")
    first = next((i for i, piece in enumerate(pieces) if piece.isdecimal()), -1)
    return ".".join(pieces[: first + 1])


class _Tie(PairingError):
    """Two changes of prefix that contradict each other; ``pairs`` is how many names either would pair in all."""

    def __init__(self, message: str, pairs: int) -> None:
        super().__init__(message)
        self.pairs = pairs


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of prefix, the names that it pairs, and how many of these have other shapes."""

    old: str
    new: str
    pairs: dict[str, str]
    misfits: int

    @property
    def score(self) -> tuple[int, int, int]:
        """Names that it pairs in one shape, names that it pairs, and components that these have in common."""
        common = sum(name.count(".") - self.old.count(".") for name in self.pairs)
        return len(self.pairs) - self.misfits, len(self.pairs), common

    def contradicts(self, other: _Change) -> bool:
        """Tell whether both pair some tensor, of either side, and differently."""
        if any(name in other.pairs and other.pairs[name] != found for name, found in self.pairs.items()):
            return True
        back = {found: name for name, found in other.pairs.items()}
        return any(found in back and back[found] != name for name, found in self.pairs.items())


def align_names(base: Names, tuned: Names) -> tuple[dict[str, str], str]:
    """Map base names to tuned names: equal ones, and those that one change of prefix, or several, make equal.

    Parameters
    ----------
    base, tuned : mapping of str to shape, or iterable of str
        Shapes decide between changes of prefix that pair equally many names.

    Returns
    -------
    mapping : dict
        Base name → tuned name.
    note : str
        The changes of prefix in words; "" if none was needed.

    Raises
    ------
    PairingError
        If two changes contradict each other and nothing separates them.

    Examples
    --------
    >>> mapping, note = align_names(["encoder.0.weight", "encoder.1.weight"],
    ...                             ["bert.encoder.0.weight", "bert.encoder.1.weight"])
    >>> mapping["encoder.0.weight"], note
    ('bert.encoder.0.weight', "names in the tuned model have 'bert.' before those of the base")
    """
    left, right = _with_shapes(base), _with_shapes(tuned)
    found = [_apply("", "", left, right)]
    for name in found[0].pairs:
        del left[name], right[name]
    while change := _choose(left, right, found):
        found.append(change)
        left = {name: shape for name, shape in left.items() if name not in change.pairs}
        taken = set(change.pairs.values())
        right = {name: shape for name, shape in right.items() if name not in taken}
    said = ", and ".join(_describe(change.old, change.new) for change in found[1:])
    mapping = {name: other for change in found for name, other in change.pairs.items()}
    return mapping, f"names in the tuned model {said}" if said else ""


def align_best(ways: Sequence[tuple[Names, Names]]) -> tuple[int, dict[str, str], str]:
    """Align two sides under several ways to name their tensors, and take the one that pairs most, of equals the first.

    Returns
    -------
    way : int
    mapping, note
        As of ``align_names``, in the names of that way.

    Raises
    ------
    PairingError
        If names are tied in one way, and no other pairs as many.
    """
    found: list[tuple[int, dict[str, str], str]] = []
    ties: list[_Tie] = []
    for number, (base, tuned) in enumerate(ways):
        try:
            found.append((number, *align_names(base, tuned)))
        except _Tie as cause:
            ties.append(cause)
    best = max(found, key=lambda row: len(row[1]), default=(0, {}, ""))
    if tie := next((tie for tie in ties if tie.pairs > len(best[1])), None):
        raise tie
    return best


def _with_shapes(names: Names) -> Shapes:
    if not isinstance(names, Mapping):
        return dict.fromkeys(names)
    return {name: shape if isinstance(shape, tuple) else None for name, shape in names.items()}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name into a prefix without numbers and a rest of two components or more."""
    yield "", name
    pieces = name.split(".")
    for i in range(1, min(len(pieces) - 1, 12)):
        if pieces[i - 1].isdecimal():
            return
        yield ".".join(pieces[:i]) + ".", ".".join(pieces[i:])


def _choose(left: Shapes, right: Shapes, before: Sequence[_Change]) -> _Change | None:
    """Return the change of prefix that pairs most of what is left; PairingError where two do, and differently."""
    changes = [_apply(old, new, left, right) for old, new in _propose(left, right)]
    changes = [change for change in changes if _is_believed(change, left, right, before)]
    if not changes:
        return None
    best = max(change.score for change in changes)
    first, *others = sorted((c for c in changes if c.score == best), key=lambda c: (len(c.old + c.new), c.old, c.new))
    if rival := next((other for other in others if other.contradicts(first)), None):
        raise _tie(first, rival, sum(len(change.pairs) for change in before))
    return first


def _propose(left: Shapes, right: Shapes) -> list[tuple[str, str]]:
    """List the changes of prefix (old, new) that most names on the right speak for, each by its longest known rest."""
    by_rest: defaultdict[str, list[str]] = defaultdict(list)
    for name in left:
        for prefix, rest in _splits(name):
            by_rest[rest].append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name in right:
        new, rest = next(((p, r) for p, r in _splits(name) if r in by_rest), ("", ""))
        olds = by_rest.get(rest, [])
        votes.update((old, new) for old in olds if len(olds) <= FEW)
    return sorted(votes, key=lambda change: (-votes[change], change))[:TRIED]


def _apply(old: str, new: str, left: Shapes, right: Shapes) -> _Change:
    pairs = {name: new + name.removeprefix(old) for name in left if name.startswith(old)}
    pairs = {name: renamed for name, renamed in pairs.items() if renamed in right}
    return _Change(old, new, pairs, sum(not _fits(left[a], right[b]) for a, b in pairs.items()))


def _fits(first: Shape | None, second: Shape | None) -> bool:
    """Tell whether tensors may be one, a kernel flattened, or a matrix stored as (d_in, d_out)."""
    if not first or not second:
        return True
    return sorted((first[0], math.prod(first[1:]))) == sorted((second[0], math.prod(second[1:])))


def _is_believed(change: _Change, left: Shapes, right: Shapes, before: Sequence[_Change]) -> bool:
    here, there = (sum(n.startswith(p) for n in names) for names, p in ((left, change.old), (right, change.new)))
    otherwise = [_paired_alike(change.old, [(c.old, c.pairs) for c in before])]
    otherwise.append(_paired_alike(change.new, [(c.new, c.pairs.values()) for c in before]))
    if 2 * len(change.pairs) <= min(here, there) or len(change.pairs) <= max(otherwise):
        return False
    blocks = Counter(block_of(name) for name in change.pairs if not name.endswith(".bias"))
    several = any(count > 1 for block, count in blocks.items() if block)
    return several or len(change.pairs) > sum(len(other.pairs) for other in before)


def _paired_alike(prefix: str, before: Sequence[tuple[str, Iterable[str]]]) -> int:
    """Count the names of one side that begin so and pair already, by what is not told of a longer prefix alone."""
    told = [names for other, names in before if not (other.startswith(prefix) and other != prefix)]
    return sum(name.startswith(prefix) for names in told for name in names)


def _tie(first: _Change, second: _Change, paired: int) -> _Tie:
    back = {found: name for name, found in second.pairs.items()}
    shared = sorted((found for found in first.pairs.values() if found in back), key=natural_order)
    if shared:
        name, sides = shared[0], ("tuned model", "base")
        mine = next(own for own, found in first.pairs.items() if found == name)
        candidates = mine, back[name]
    else:
        shared = sorted((own for own in first.pairs if own in second.pairs), key=natural_order)
        name, sides = shared[0], ("base", "tuned model")
        candidates = first.pairs[name], second.pairs[name]
    more = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
    ways = " or ".join(f"--map '{change.new}={change.old}'" for change in (first, second))
    message = (
        f"Cannot tell what '{name}'{more} of the {sides[0]} is in the {sides[1]}: '{candidates[0]}' and "
        f"'{candidates[1]}' fit equally well; decide with {ways}."
    )
    return _Tie(message, paired + len(first.pairs))


def _describe(old: str, new: str) -> str:
    """Say how a prefix differs."""
    if not old or not new:
        return f"have '{new}' before those of the base" if new else f"lack the '{old}' of those of the base"
    return f"begin with '{new}' where those of the base begin with '{old}'"
