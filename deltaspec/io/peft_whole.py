"""Modules that an adapter stores whole (modules_to_save): which PEFT can save by name, and all that they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from deltaspec.architecture.peft_names import PREFIX, lies_inside, saved_alike
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_layout import Layout
from deltaspec.io.peft_targets import Target
from deltaspec.types import Entry

PLAIN = re.compile(r"[\w.-]+")


def plan_whole(
    full: Sequence[Entry], layout: Layout, targets: Sequence[Target], refused: dict[str, str]
) -> tuple[list[str], list[Entry]]:
    """Choose the modules to be saved whole, and list all that they hold: what is not given is the base's.

    Parameters
    ----------
    full : sequence of Entry
        Under the base's names. An embedding serves every module that is tied to it.
    layout : Layout
    targets : sequence of Target
        Whose modules PEFT could not save whole too.
    refused : dict
        Gets a reason for each tensor that cannot be stored.

    Returns
    -------
    paths : list of str
        Of the modules, for modules_to_save.
    entries : list of Entry
    """
    reasons = {entry.name: "the running model holds it in another form" for entry in full if _moved(entry, layout)}
    given = _spread([entry for entry in full if entry.name not in reasons], layout)
    own: dict[str, set[str]] = {}
    for name, entry in given.items():
        own.setdefault(name.rpartition(".")[0], set()).add(entry.name)
    for path, names in own.items():
        if reason := _collision(path, layout, targets) or _incomplete(path, given, layout):
            reasons.update(dict.fromkeys(names, reason))
    _block_companions(own, reasons)
    refused.update(reasons)
    kept = [path for path in sorted(own) if not own[path] & reasons.keys()]
    saved = [path for path in kept if not any(path.startswith(f"{outer}.") for outer in kept)]
    carried = {name: entry for name, entry in given.items() if entry.name not in reasons}
    return saved, [_whole_entry(name, carried, layout) for path in saved for name in _held(path, carried, layout)]


def _moved(entry: Entry, layout: Layout) -> bool:
    """Tell whether a tensor is a part of another in the running model, in parts, or rearranged."""
    return any(place.moved or place.parts > 1 or place.expert is not None for place in layout.place(entry.name))


def _block_companions(own: dict[str, set[str]], reasons: dict[str, str]) -> None:
    """Store what lies in one module, or is one weight in several, everywhere or nowhere."""
    while blocked := {
        name: reasons[next(iter(names & reasons.keys()))]
        for names in own.values()
        if names & reasons.keys()
        for name in names - reasons.keys()
    }:
        reasons.update(blocked)


def _spread(full: Sequence[Entry], layout: Layout) -> dict[str, Entry]:
    """Map parameters of the running model to what is given for them, tied ones too."""
    given = {place.name: entry for entry in full for place in layout.place(entry.name)}
    for name, entry in list(given.items()):
        path = name.removesuffix(".weight")
        shared = {f"{use}.weight" for use, _ in layout.uses(path)}
        shared |= {other for other in layout.tied_with(name) if other not in layout.running}
        for other in sorted(shared - {name}):
            given.setdefault(other, entry)
        if layout.is_unread(path):
            del given[name]
    return given


def _held(path: str, given: dict[str, Entry], layout: Layout) -> list[str]:
    """List the parameters of a module and of what it holds that are given, or that the base stores."""
    inside = {name for name in (*layout.parameters(), *given) if name.startswith(f"{path}.") or name in given}
    own = {name for name in inside if name.rpartition(".")[0] == path or (path and name.startswith(f"{path}."))}
    return sorted(name for name in own if name in given or _stored(name, layout))


def _stored(name: str, layout: Layout) -> str:
    """Name the base's tensor that a parameter is, its own or one that it is tied to; "" where the base has none."""
    shared = (name, *sorted(layout.tied_with(name)))
    return next((layout.running[other] for other in shared if other in layout.running), "")


def _of_base(stored: str, layout: Layout) -> Entry:
    spec = layout.base.tensors[stored]
    return Entry(stored, spec.shape, spec.dtype, partial(read_tensor, spec))


def _collision(path: str, layout: Layout, targets: Sequence[Target]) -> str:
    """Say why PEFT cannot save just this module, by how it matches names: endswith, and a regular expression."""
    if not PLAIN.fullmatch(path):
        return "it lies in no module that PEFT could save by its name"
    if layout.is_typed(path):
        return "its module must stay of its class, and PEFT would wrap it"
    if other := saved_alike(path, layout.modules):
        return f"PEFT would save '{other}' too, whose name ends alike"
    for target in targets:
        if lies_inside(target.path, path):
            return f"its module would be saved whole with '{target.sources[0]}', which has factors"
        if path.startswith(f"{target.path}."):
            return f"its module lies inside that of '{target.sources[0]}', which has factors"
    return ""


def _incomplete(path: str, given: dict[str, Entry], layout: Layout) -> str:
    """Say which tensor of a module can be taken neither from what is given nor from the base as it is."""
    for name in _held(path, given, layout):
        if layout.lacks(name):
            return f"{layout.checked} has no parameter of this name"
        stored = given[name].name if name in given else _stored(name, layout)
        place = layout.place(stored)[0]
        scaled = name not in given and layout.base.tensors[stored].scale
        if scaled or place.moved or place.parts > 1 or place.expert is not None:
            return f"its module also holds '{stored}', which the base stores in another form"
    return ""


def _whole_entry(name: str, given: dict[str, Entry], layout: Layout) -> Entry:
    entry = given.get(name) or _of_base(_stored(name, layout), layout)
    return Entry(f"{PREFIX}{name}", entry.shape, entry.dtype, entry.read)
