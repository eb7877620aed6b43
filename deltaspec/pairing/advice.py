"""What to do where an adapter does not fit a base: another advice where the base is the adapter's own."""

from __future__ import annotations

import re
from pathlib import Path

from deltaspec.errors import PairingError
from deltaspec.pairing.homes import factor_shape, weight_of
from deltaspec.pairing.plan import VOCABULARY_ROLES, Pairing
from deltaspec.types import AdapterIndex, Checkpoint

ONE_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.[0-9]+\.(?P<leaf>.+)\.weight")


def is_own_base(base: Checkpoint, adapter: AdapterIndex) -> bool:
    """Tell whether a base is the one that an adapter's config names, by its path or its name on the hub."""
    named = adapter.base_model
    if not named:
        return False
    return named == base.ref.partition("@")[0] or Path(named).expanduser().resolve() == base.root.resolve()


def advise_base(base: Checkpoint, adapter: AdapterIndex) -> str:
    """Say which base to pass, as a sentence."""
    if is_own_base(base, adapter):
        return (
            f"{base.ref} is the base that its config names, so the adapter was trained on a model that was changed "
            "after loading: save that model with save_pretrained, and pass it."
        )
    return f"Pass the base it was trained from{_named(adapter)}."


def _named(adapter: AdapterIndex) -> str:
    return f" (its config says '{adapter.base_model}')" if adapter.base_model else ""


def say_missing(base: Checkpoint, adapter: AdapterIndex, name: str) -> str:
    """Say what to do where an adapter has factors of a tensor that the base lacks.

    Parameters
    ----------
    base : Checkpoint
    adapter : AdapterIndex
    name : str
        The weight that the factors change.
    """
    what = f"The adapter {adapter.ref} targets '{name}', which {base.ref} lacks"
    expert, shape = ONE_EXPERT.fullmatch(name), factor_shape(adapter.modules[_path(adapter, name)])
    if expert and any(stored.startswith(f"{expert['stack']}.") for stored in base.tensors):
        return (
            f"{what}: it is one expert, and the base stores '{expert['stack']}' as stacks. Pass the model as it is "
            "with its experts one by one (save_pretrained of transformers writes it so with save_original_format=True)."
        )
    if _grows(base, shape):
        return (
            f"{what}: it has {shape[0]} rows, more than the base's embedding, for the vocabulary grew before training. "
            f"{_advise_grown(adapter, name, shape[0])}"
        )
    if is_own_base(base, adapter):
        return f"{what}. {advise_base(base, adapter)}"
    return f"{what}: pass the base it was trained from{_named(adapter)}."


def _path(adapter: AdapterIndex, name: str) -> str:
    return next(path for path in adapter.modules if weight_of(path) == name)


def _grows(base: Checkpoint, shape: tuple[int, int]) -> bool:
    """Tell whether factors fit the base's embedding but for their number of rows."""
    rows = base.config.get("vocab_size")
    held = (spec.shape for spec in base.tensors.values() if len(spec.shape) == 2)
    return isinstance(rows, int) and shape[0] > rows and (rows, shape[1]) in held


def refuse_grown(work: Pairing, base: Checkpoint, adapter: AdapterIndex) -> None:
    """Stop where factors have more rows than the base's vocabulary: it grew between loading and training.

    Raises
    ------
    PairingError
        If one of the tensors whose shapes disagree did.
    """
    for name, stored, shape in work.wrong:
        vocabulary = {key.role for key in work.keys(name)} & VOCABULARY_ROLES
        if vocabulary and len(stored) == len(shape) == 2 and stored[1] == shape[1] and stored[0] < shape[0]:
            message = (
                f"The adapter {adapter.ref} has factors of '{name}' with {shape[0]} rows, and {base.ref} has "
                f"{stored[0]}: it grew before training. {_advise_grown(adapter, name, shape[0])}"
            )
            raise PairingError(message)


def _advise_grown(adapter: AdapterIndex, name: str, rows: int) -> str:
    if name in adapter.full:
        return "deltaspec merge makes the whole model, to compare with --vocab common."
    return (
        "The adapter does not hold the new rows: save the model it was trained on, after "
        f"resize_token_embeddings({rows}), with save_pretrained, and pass that as the base."
    )
