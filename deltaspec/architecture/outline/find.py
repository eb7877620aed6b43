"""A config → the outline of its model, made once; or the reason why there is none."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from deltaspec.architecture.outline.build import UnknownModelError, build_model
from deltaspec.architecture.outline.conversions import Conversions
from deltaspec.architecture.outline.holders import describe_holders
from deltaspec.architecture.outline.reads import find_uses
from deltaspec.types import Config, Outline, Place


def find_outline(config: Config) -> Outline | str:
    """Outline the model that transformers or diffusers makes of a config.

    Parameters
    ----------
    config : mapping
        Content of config.json.

    Returns
    -------
    Outline or str
        The latter says, as half a sentence, why no library tells.
    """
    try:
        key = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return "its config holds what is no JSON"
    return _find(key)


@lru_cache(maxsize=16)
def _find(key: str) -> Outline | str:
    try:
        model, source = build_model(json.loads(key))
    except UnknownModelError as cause:
        return str(cause)
    return outline_of(model, source)


def outline_of(model: nn.Module, source: str) -> Outline:
    """Describe a model that is made already, on whatever device."""
    uses = find_uses(model)
    same: defaultdict[int, set[str]] = defaultdict(set)
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].add(name)
        shapes[name] = tuple(parameter.shape)
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    shapes |= buffers
    ties = tuple(frozenset(names) for names in same.values() if len(names) > 1)
    tied = {name.rpartition(".")[0] for names in ties for name in names}
    unread = frozenset(path for path in tied - uses.named if isinstance(model.get_submodule(path), nn.Embedding))
    holders = describe_holders(model, uses)
    outline = Outline(source, shapes, holders, frozenset(buffers), ties, unread, _as_named, str)
    if not source.startswith("transformers"):
        return outline
    made, matters = Conversions(model), "tie_word_embeddings" in uses.asked
    outline = replace(outline, place=made.place, in_peft=made.renamed, takes_experts=made.takes_experts)
    return replace(outline, unloadable=_why_unloadable(model), tie_matters=matters)


def _as_named(names: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """Place every tensor under its own name."""
    return {name: (Place(name),) for name in names}


def _why_unloadable(model: Any) -> str:
    """Say why PEFT 0.21 loads no adapter of a class: it asks models that tie weights for their input embeddings."""
    if not isinstance(getattr(model, "_tied_weights_keys", None), dict):
        return ""
    try:
        model.get_input_embeddings().parameters()
    except Exception:  # what a class raises that has none
        return f"PEFT loads no adapter of a {type(model).__name__}, which ties weights and has no input embeddings"
    return ""
