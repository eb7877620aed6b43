"""Factors of modules that share a weight with others: PEFT changes each module by its own factors, and no other."""

from __future__ import annotations

from dataclasses import replace

from deltaspec.architecture.match import Identification
from deltaspec.errors import PairingError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_layout import Layout
from deltaspec.pairing.homes import Homes, factor_shape, weight_of
from deltaspec.pairing.names import natural_order
from deltaspec.pairing.plan import Plan
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import AdapterIndex, LowRankSource, LowRankTerm, MatrixSource, Place, WeightPair


def pair_tied(plan: Plan, layout: Layout, tuned: AdapterIndex, homes: Homes, known: Identification) -> None:
    """Settle factors of modules that the base stores no weight for: they may share another's.

    A module whose factors are those of the weight's own module changes nothing more. One with other factors, or alone,
    parts from the weight: it is compared with it, under its own name.

    Parameters
    ----------
    plan : Plan
    layout : Layout
        Of the base.
    tuned : AdapterIndex
    homes : dict
        Gets the modules that the weight's change is taken from.
    known : Identification
        Of the base.

    Raises
    ------
    PairingError
        If a module shares nothing.
    """
    terms = tuned.modules  # tables of vectors first: the weight's own change is theirs
    for path in sorted(terms.keys() - homes.keys(), key=lambda path: (not terms[path].embedding, natural_order(path))):
        term, name = terms[path], weight_of(path)
        stored = _shared(layout, name, factor_shape(term), known)
        if stored is None:
            raise _lacks(layout, tuned, name)
        (found,) = known.matrices[stored]
        twin = next((p for p, home in homes.items() if home[0][0] == stored and p in tuned.modules), None)
        first = twin is None and term.embedding and layout.is_unread(_path(layout, stored))
        own = tuned.modules[twin] if twin and _same_product(tuned.modules[twin], term) else term
        key = replace(found.key, tensor=name, role="lm_head")
        sources = MatrixSource(layout.base.tensors[stored], found.view), LowRankSource((own,), found.view)
        pair = WeightPair(key, found.view.shape, *sources)
        if first:
            homes[path] = [(stored, Place(stored))]
            plan.twins.append(pair)
            plan.note(f"'{name}' is not stored in the base: its factors change the tied '{stored}'")
        elif own is not term:
            plan.twins.append(pair)
            plan.note(f"'{name}' is tied to '{stored}' and has the same factors")
        else:
            plan.pairs.append(pair)
            plan.note(f"'{name}' has factors of its own: compared with the base's tied '{stored}'")


def _path(layout: Layout, stored: str) -> str:
    return layout.place(stored)[0].name.removesuffix(".weight")


def _shared(layout: Layout, name: str, shape: tuple[int, int], known: Identification) -> str | None:
    """Name the base's tensor that a module's weight is another name for."""
    candidates = [n for n, found in known.matrices.items() if len(found) == 1 and found[0].view.shape == shape]
    if layout.checked:
        return next((n for n in candidates if f"{_path(layout, n)}.weight" in layout.tied_with(name)), None)
    if not name.endswith((*HEAD_NAMES, "vocab_projector.weight", "embed_tokens.weight")):
        return None
    return next((n for n in candidates if known.matrices[n][0].key.role == "embed"), None)


def _lacks(layout: Layout, tuned: AdapterIndex, name: str) -> PairingError:
    base = layout.base.ref
    advice = f"pass the base it was trained from (its config says '{tuned.base_model}')"
    reason = layout.unattached(name.removesuffix(".weight"))
    message = (
        f"The adapter {tuned.ref} targets '{name}', which {base} lacks{f' ({reason})' if reason else ''}: {advice}."
    )
    return PairingError(message)


def _same_product(first: LowRankTerm, second: LowRankTerm) -> bool:
    """Tell whether two terms hold the same factors, one perhaps laid out for an embedding."""
    sides = []
    for term in (first, second):
        lora_A, lora_B = read_tensor(term.lora_A), read_tensor(term.lora_B)
        sides.append((lora_B.mT, lora_A.mT) if term.embedding else (lora_A, lora_B))
    (a, b), (c, d) = sides
    return first.scaling == second.scaling and a.shape == c.shape and bool((a == c).all()) and bool((b == d).all())
