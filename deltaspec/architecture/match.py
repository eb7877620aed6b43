"""From every tensor's name and shape to the matrices that it holds; an unknown name is guessed, and said to be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from deltaspec.architecture.patterns import EXPERT, Family, RoleEntry, load_families, select_families
from deltaspec.architecture.roles import own_role
from deltaspec.architecture.sizes import Sizes, read_model_types, read_sizes
from deltaspec.architecture.views import alternating_parts, attention_parts, equal_parts, whole
from deltaspec.types import KnownMatrix, MatrixKey, Shape, View

DIGITS = re.compile(r"[0-9]+")
STACKED = re.compile(r"(?:^|\.)experts(?:\.|$)")
BIAS = re.compile(r"(?:^|[._])bias$|(?:^|\.)beta$")
NORM = re.compile(r"norm|(?:^|[._])(?:ln|bn|gn)(?:$|[._0-9])", re.IGNORECASE)
# Enough names to recognise a family, few enough that a hostile index costs nothing.
SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Identification:
    """What a checkpoint's tensors hold, by tensor name.

    ``vectors`` are the tensors with less than two axes, and biases of any shape (experts' biases, stacked).
    ``guessed`` names the tensors that no family knew, or whose parts could not be told apart with certainty.
    """

    matrices: dict[str, tuple[KnownMatrix, ...]]
    vectors: dict[str, MatrixKey]
    family: str
    guessed: tuple[str, ...]


def identify(tensors: Mapping[str, Shape], config: dict[str, Any]) -> Identification:
    """Say which matrices every tensor of a checkpoint holds, and their roles and places.

    Parameters
    ----------
    tensors : mapping of str to tuple of int
        Every tensor's name and stored shape.
    config : dict
        Content of config.json; it may be empty, and is believed only where its sizes add up.

    Returns
    -------
    Identification
        Every tensor is in ``matrices`` or in ``vectors``; ``family`` is "generic" if none is known.

    Examples
    --------
    >>> name = "model.layers.3.self_attn.q_proj.weight"
    >>> (found,) = identify({name: (8, 8)}, {"model_type": "llama"}).matrices[name]
    >>> found.key.role, found.key.depth, found.view.shape
    ('q_proj', 3, (8, 8))
    """
    families, declared = _choose_families(tensors, config)
    sizes = read_sizes(config, declared=declared)
    matrices: dict[str, tuple[KnownMatrix, ...]] = {}
    vectors: dict[str, MatrixKey] = {}
    for name, shape in tensors.items():
        if len(shape) < 2 or BIAS.search(name):
            vectors[name] = _identify_vector(name, shape, families=families)
        else:
            matrices[name] = _identify_matrices(name, shape, families=families, sizes=sizes)
    if len(_list_stacks(matrices, vectors)) == 1:
        matrices = {name: tuple(_without_stack(matrix) for matrix in found) for name, found in matrices.items()}
        vectors = {name: replace(key, stack="") for name, key in vectors.items()}
    guessed = tuple(name for name, found in matrices.items() if any(matrix.guessed for matrix in found))
    return Identification(matrices, vectors, families[0].name, guessed)


def _choose_families(tensors: Mapping[str, Shape], config: dict[str, Any]) -> tuple[Sequence[Family], bool]:
    """Return the families to ask, in order, the generic one last; and whether config.json named them."""
    *known, generic = load_families()
    samples = {DIGITS.sub("#", name): (name, shape) for name, shape in tensors.items() if len(shape) >= 2}
    cases = list(islice(samples.values(), SAMPLES))
    sizes, _ = read_sizes(config, declared=True)
    declared = select_families(read_model_types(config))
    if declared and 2 * _coverage(cases, declared, sizes=sizes) >= len(cases):
        return (*declared, generic), True
    coverages = [_coverage(cases, (family,), sizes=sizes) for family in known]
    best = max(coverages)
    if best and 2 * best >= len(cases):
        return (known[coverages.index(best)], generic), False
    return (generic,), False


def _coverage(cases: list[tuple[str, Shape]], families: Sequence[Family], *, sizes: Sizes) -> int:
    """Count the cases that a family knows and whose shape fits what it expects."""
    covered = 0
    for name, shape in cases:
        found = _find_entry(name, shape, families=families)
        covered += found is not None and not _read(shape, found[1], key=MatrixKey(name), sizes=sizes)[0].guessed
    return covered


def _find_entry(name: str, shape: Shape, *, families: Sequence[Family]) -> tuple[Family, RoleEntry] | None:
    """Return the first family that knows the name; one that knows it as a single matrix does not know a stack."""
    stacked = _is_stack(name, shape)
    entries = ((family, entry) for family in families if (entry := family.find(name)))
    return next(((family, entry) for family, entry in entries if entry.experts or not stacked), None)


def _is_stack(name: str, shape: Shape) -> bool:
    return len(shape) == 3 and bool(STACKED.search(name)) and not EXPERT.search(name)


def _identify_vector(name: str, shape: Shape, *, families: Sequence[Family]) -> MatrixKey:
    known = families[:-1] or families
    key = next((found for family in known if (found := family.place(name)).depth is not None), known[0].place(name))
    if BIAS.search(name) and len(shape) <= 2:
        return replace(key, role="bias")
    return replace(key, role="norm") if NORM.search(name) and len(shape) < 2 else key


def _identify_matrices(
    name: str, shape: Shape, *, families: Sequence[Family], sizes: tuple[Sizes, Sizes]
) -> tuple[KnownMatrix, ...]:
    text, vision = sizes
    *known, generic = families
    if found := _find_entry(name, shape, families=known):
        family, entry = found
        key = family.place(name)
        return _read(shape, entry, key=key, sizes=vision if key.stack == "vision" else text)
    entry = replace(generic.find(name) or RoleEntry(own_role(name)), experts=_is_stack(name, shape))
    guesses = _read(shape, entry, key=generic.place(name), sizes=Sizes())
    return tuple(replace(guess, guessed=True) for guess in guesses)


def _read(shape: Shape, entry: RoleEntry, *, key: MatrixKey, sizes: Sizes) -> tuple[KnownMatrix, ...]:
    if not entry.experts:
        return _split(whole(shape, transposed=entry.transposed), entry, key=key, sizes=sizes)
    if len(shape) != 3:
        return _split(whole(shape), entry, key=key, sizes=sizes)
    if 0 in shape:
        return (KnownMatrix(replace(key, role=entry.unsplit_role), whole(shape), guessed=True),)
    view = whole(shape, expert=0, transposed=entry.transposed)
    found = _split(view, entry, key=key, sizes=sizes)
    # Orientation and order of a stack are conventions of the family, invisible in the shape.
    if not sizes.declared or sizes.hidden not in (None, view.shape[0 if entry.role == "down_proj" else 1]):
        found = (KnownMatrix(replace(key, role=entry.unsplit_role), view, guessed=True),)
    return tuple(_of_expert(matrix, expert) for expert in range(shape[0]) for matrix in found)


def _split(view: View, entry: RoleEntry, *, key: MatrixKey, sizes: Sizes) -> tuple[KnownMatrix, ...]:
    if not entry.parts:
        return (KnownMatrix(replace(key, role=entry.role), view),)
    views = _part_views(view, entry, sizes=sizes)
    # Other models give the same names to other layouts, so names alone make a split a guess.
    guessed = not views or not sizes.declared
    if not views and entry.layout == "blocks" and view.shape[0] == 3 * view.shape[1]:
        views = equal_parts(view, 3)
    if not views:
        return (KnownMatrix(replace(key, role=entry.unsplit_role), view, guessed=True),)
    parts = zip(entry.parts, views, strict=True)
    return tuple(KnownMatrix(replace(key, part=role, role=role), part, guessed=guessed) for role, part in parts)


def _part_views(view: View, entry: RoleEntry, *, sizes: Sizes) -> tuple[View, ...]:
    rows, d_in = view.shape
    count = len(entry.parts)
    if entry.layout == "alternating":
        return alternating_parts(view, count)
    if entry.layout in ("blocks", "grouped"):
        heads = sizes.attention(d_in)
        return attention_parts(view, heads, grouped=entry.layout == "grouped") if heads else ()
    # Keys as wide as the input: anything else means other head counts than this layout allows.
    if "k_proj" in entry.parts and rows != count * d_in:
        return ()
    return equal_parts(view, count)


def _of_expert(matrix: KnownMatrix, expert: int) -> KnownMatrix:
    return replace(matrix, key=replace(matrix.key, expert=expert), view=replace(matrix.view, expert=expert))


def _list_stacks(matrices: dict[str, tuple[KnownMatrix, ...]], vectors: dict[str, MatrixKey]) -> set[str]:
    keys = [*(matrix.key for found in matrices.values() for matrix in found), *vectors.values()]
    return {key.stack for key in keys if key.depth is not None}


def _without_stack(matrix: KnownMatrix) -> KnownMatrix:
    return replace(matrix, key=replace(matrix.key, stack="")) if matrix.key.stack else matrix
