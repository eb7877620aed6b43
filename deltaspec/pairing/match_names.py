"""Two checkpoints: which stored name is which, by what is stored and by what the running model makes of it."""

from __future__ import annotations

from collections import Counter

from deltaspec.architecture.running_names import place_tensors
from deltaspec.pairing.names import align_best
from deltaspec.types import Checkpoint, Place, Shape


def match_names(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, str], str]:
    """Map the base's tensor names to the tuned model's.

    Equal names pair first; then names that are one in the running model (a hub's against those that a newer library
    saves); then what changes of prefix pair, of stored names or of running ones, whichever are more.

    Returns
    -------
    mapping : dict
    note : str
        What was assumed, in words; "" where names are equal.

    Raises
    ------
    PairingError
        If names are tied; see ``align_names``.
    """
    ours, theirs = ({name: spec.shape for name, spec in side.tensors.items()} for side in (base, tuned))
    if ours.keys() <= theirs.keys() or theirs.keys() <= ours.keys():
        return {name: name for name in ours if name in theirs}, ""
    at_base, at_tuned = _by_place(base, base), _by_place(tuned, base)
    alike = {
        other: at_base[place]
        for place, other in at_tuned.items()
        if place in at_base and other not in ours and at_base[place] not in theirs
    }
    stored: dict[str, Shape | None] = {alike.get(name, name): shape for name, shape in theirs.items()}
    back = {renamed: name for name, renamed in alike.items()}
    running = [_under_places(ours, at_base), _under_places(theirs, at_tuned)]
    way, mapping, note = align_best([(ours, stored), (running[0][0], running[1][0])])
    if way:
        return {running[0][1][name]: running[1][1][found] for name, found in mapping.items()}, note
    if not note and alike:
        note = f"{len(alike)} tensors have names of another version of the model, and pair by those of the running one"
    return {name: back.get(found, found) for name, found in mapping.items()}, note


def _by_place(side: Checkpoint, base: Checkpoint) -> dict[tuple[Place, ...], str]:
    """Map each place in the running model that exactly one stored tensor takes to that tensor."""
    places = place_tensors(side.tensors, side.config if side.config.get("model_type") else base.config)
    taken = Counter(places.values())
    return {place: name for name, place in places.items() if taken[place] == 1}


def _under_places(
    shapes: dict[str, Shape], places: dict[tuple[Place, ...], str]
) -> tuple[dict[str, Shape | None], dict[str, str]]:
    """Name tensors as the running model does, where each is one whole parameter of it: shapes, and stored names."""
    names = {place[0].name: name for place, name in places.items() if place == (Place(place[0].name),)}
    return {running: shapes[name] for running, name in names.items()}, names
