"""Where an adapter's factors belong in the base: by stored names, or by those of the running model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from deltaspec.architecture.match import Identification
from deltaspec.io.peft_layout import Layout
from deltaspec.pairing.names import align_best
from deltaspec.pairing.plan import Plan
from deltaspec.types import (
    AdapterIndex,
    KnownMatrix,
    LowRankSource,
    LowRankTerm,
    MatrixSource,
    Place,
    Shape,
    View,
    WeightPair,
)

Homes = dict[str, list[tuple[str, Place]]]


def find_homes(layout: Layout, paths: Collection[str] | Mapping[str, Shape | None], plan: Plan) -> Homes:
    """Map what an adapter names to the base's tensors.

    Parameters
    ----------
    layout : Layout
        Of the base.
    paths : collection of str, or mapping of str to shape
        Module paths, parameters' names and names of tensors stored whole; shapes, where they are known, decide
        between homes of equal names.
    plan : Plan
        Notes a prefix that differs.

    Returns
    -------
    dict
        Path → the base's tensors, each with its place in what the path names; paths that the base lacks are missing.
        Names of the running model come first, for PEFT addresses those; then the stored ones.
    """
    ways = _running(layout), {name: [(name, Place(name))] for name in layout.base.tensors}
    shapes = dict(paths) if isinstance(paths, Mapping) else dict.fromkeys(paths)
    asked = [{path if path in names else weight_of(path): path for path in paths} for names in ways]  # last of a name
    homes: Homes = {}
    for names, wanted in zip(ways, asked, strict=True):
        homes |= {path: names[name] for name, path in wanted.items() if name in names and path not in homes}
    if len(homes) == len(asked[-1]):
        return homes
    sides = [
        ({n: _shape(layout, home) for n, home in names.items()}, {n: shapes[path] for n, path in wanted.items()})
        for names, wanted in zip(ways[::-1], asked[::-1], strict=True)
    ]
    way, mapping, note = align_best(sides)
    if len(mapping) <= len(homes):
        return homes
    if note:
        plan.note(note)
    names, wanted = ways[::-1][way], asked[::-1][way]
    return {wanted[mapped]: names[name] for name, mapped in mapping.items()}


def _shape(layout: Layout, home: list[tuple[str, Place]]) -> Shape | None:
    """Return the shape of a module's weight, where one stored tensor is it, and no stack of experts."""
    (name, place), shape = home[0], layout.base.tensors[home[0][0]].shape
    whole = len(home) == 1 and place.expert is None and place.parts == 1
    return shape if whole and name.endswith(".weight") else None


def list_wanted(adapter: AdapterIndex) -> dict[str, Shape | None]:
    """Map all that an adapter names to its shape: factors before a weight saved beside them, None for stacks'."""
    terms = {path: None if term.experts else factor_shape(term) for path, term in adapter.modules.items()}
    return {name: spec.shape for name, spec in adapter.full.items()} | terms


def _running(layout: Layout) -> Homes:
    """Map the running model's parameters to the tensors that hold their rows."""
    running: Homes = {}
    for name, places in layout.places.items():
        for place in places:
            if not place.moved:
                running.setdefault(place.name, []).append((name, place))
    return running


def weight_of(path: str) -> str:
    """Name the tensor that a module path adapts: its weight.

    >>> weight_of("model.layers.0.mlp.up_proj"), weight_of("mlp.router.weight")
    ('model.layers.0.mlp.up_proj.weight', 'mlp.router.weight')
    """
    return path if path.endswith((".weight", ".bias")) else f"{path}.weight"


def factor_shape(term: LowRankTerm) -> tuple[int, int]:
    """(d_out, d_in) of a stored pair of factors, of one expert where they are a stack's; kernels flattened."""
    a, b = term.lora_A.shape, term.lora_B.shape
    return (a[1], b[0]) if term.embedding else (b[0], math.prod(a[1:]))


def pair_factors(
    known: Identification, name: str, *, term: LowRankTerm, home: list[tuple[str, Place]], layout: Layout
) -> list[WeightPair]:
    """Pair each matrix of a tensor with its rows of a product, and its expert of a stack.

    Parameters
    ----------
    known : Identification
        Of the base.
    name : str
        The base's tensor.
    term : LowRankTerm
    home : list of (str, Place)
        All tensors that the term changes, this one among them.
    layout : Layout

    Returns
    -------
    list of WeightPair
        Empty where the shapes do not fit.
    """
    found = known.matrices.get(name, ())
    if not found:
        return []
    first, place = found[0].view, dict(home)[name]
    height = sum(part.view.shape[0] for part in found if part.view.expert == first.expert)
    experts = {place.expert for _, place in home} if place.expert is not None else {p.view.expert for p in found}
    stack = first.expert is not None
    turned = layout.swaps(name, transposed=first.transposed, stack=stack)
    rows = height * place.parts if place.expert is not None else height // place.parts
    shape = factor_shape(term)
    whole = (first.shape[1], rows) if turned else (rows, first.shape[1])
    if shape != whole or len(experts) != max(term.experts, 1):
        return []
    pairs = []
    for part in _in_parts(found, place, height):
        view = _view(part.view, place, height, turned=turned)
        if view:
            source = LowRankSource((term,), view)
            dense = MatrixSource(layout.base.tensors[name], part.view)
            pairs.append(WeightPair(part.key, view.shape, dense, source, part.guessed))
    return pairs


def _in_parts(found: tuple[KnownMatrix, ...], place: Place, height: int) -> tuple[KnownMatrix, ...]:
    """Cut out the rows that a place holds where no family says that they are a matrix of their own."""
    (whole, *others), rows = found, height // place.parts
    if place.expert is not None or place.parts == 1 or others:
        return found
    leaf = place.name.removesuffix(".weight").rpartition(".")[2]
    view = replace(whole.view, shape=(rows, whole.view.shape[1]), start=place.part * rows, stop=(place.part + 1) * rows)
    return (replace(whole, key=replace(whole.key, part=leaf, role=leaf), view=view),)


def _view(view: View, place: Place, height: int, *, turned: bool) -> View | None:
    """Return where a matrix of the base lies in the product; None where the product has another block of rows."""
    if place.expert is not None:
        start = place.part * height
        return View(view.shape, expert=place.expert, start=start, stop=start + height)
    if place.parts == 1:
        return replace(view, transposed=turned)
    rows = height // place.parts
    return View(view.shape) if (view.start, view.shape[0]) == (place.part * rows, rows) else None
