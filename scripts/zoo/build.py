"""Build a tiny random model of one architecture, with inputs that it runs on where any are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .catalogue import Species
from .inputs import find_inputs
from .others import build_other
from .overrides import OVERRIDES
from .shrink import RECIPES, shrink

MOST = 5_000_000


class NotBuilt(Exception):
    """No tiny model of this architecture could be made; the text says why."""


def build(species: Species) -> tuple[Any, dict[str, Tensor] | None]:
    """Return a tiny model and inputs, None where its forward could not be fed.

    Raises
    ------
    NotBuilt
        If no recipe makes one.
    """
    if species.library != "transformers":
        return build_other(species.library, species.cls)
    reasons, fallback = [], None
    for config in _configs(species, reasons):
        try:
            model = _make(species, config)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:200]}")
            continue
        inputs = find_inputs(model)
        if inputs is not None:
            return model, inputs
        fallback = fallback or model
    if fallback is not None:
        return fallback, None
    message = reasons[0] if reasons else "no configuration"
    raise NotBuilt(" || ".join(dict.fromkeys(reasons)) or message)


def _configs(species: Species, reasons: list[str]) -> Iterator[Any]:
    cls = species.model_class().config_class
    changed = OVERRIDES.get(species.name, {})
    for recipe in RECIPES:
        try:
            config = cls(**changed.get("start", {})) if "start" in changed else cls()
            fields = shrink(config, recipe)
            yield cls(**_overlay(fields, {k: v for k, v in changed.items() if k != "start"}))
        except Exception as error:
            reasons.append(f"{cls.__name__}: {type(error).__name__}: {str(error)[:200]}")


def _overlay(fields: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Lay overrides over fields, dicts key by key."""
    return fields | {
        name: _overlay(fields.get(name) or {}, value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }


def _make(species: Species, config: Any) -> nn.Module:
    cls = species.model_class()
    try:
        with torch.device("meta"):
            size = _size(cls(config))
    except Exception:
        size = 0
    if size > MOST:
        message = f"{size:,} parameters"
        raise ValueError(message)
    torch.manual_seed(0)
    model = cls(config)
    if (size := _size(model)) > MOST:
        message = f"{size:,} parameters"
        raise ValueError(message)
    return model.float().eval()


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
