"""Example inputs by the names in forward's signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SEED = 1


def find_inputs(model: Any) -> dict[str, Tensor] | None:
    """Return inputs on which the model runs and says something finite; None if no try succeeds."""
    for inputs in _tries(model):
        try:
            found = run(model, inputs)
        except Exception:  # noqa: BLE001, S112, PERF203 (the next try)
            continue
        if found and all(bool(torch.isfinite(value).all()) for value in found.values()):
            return inputs
    return None


def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a model and return every floating tensor that comes out, by its place in the output."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        return dict(_floats(model(**inputs), ""))


def repeats(one: Any, other: Any, inputs: dict[str, Tensor]) -> bool:
    """Tell whether two models of the same weights say the same, finite thing; some draw numbers as they run."""
    try:
        first, second = run(one, inputs), run(other, inputs)
    except Exception:  # noqa: BLE001 (a model that does not run says nothing)
        return False
    return first.keys() == second.keys() and all(
        bool(torch.isfinite(value).all()) and torch.allclose(value, second[place], rtol=1e-5, atol=1e-6)
        for place, value in first.items()
    )


def _floats(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield place, value
    elif isinstance(value, dict) or hasattr(value, "items"):
        for key, inner in value.items():
            yield from _floats(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _floats(inner, f"{place}.{i}")


def _tries(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yield sets of inputs, fullest first."""
    names = set(inspect.signature(model.forward).parameters)
    config = model.config
    text = {k: v for k, v in _text(config).items() if k in names}
    decoder = {k: v for k, v in _decoder(config).items() if k in names}
    for media in _media(config, names):
        yield {**text, **media, **decoder}
        yield {**media, **decoder}
        yield {**media}
    yield {**text, **decoder}
    yield text


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def _tokens(config: Any, *shape: int) -> Tensor:
    return torch.randint(3, 19, shape or (2, 8), generator=torch.Generator().manual_seed(SEED))


def _text(config: Any) -> dict[str, Tensor]:
    boxes = torch.tensor([1, 2, 7, 9]).repeat(2, 8, 1)
    return {"input_ids": _tokens(config), "attention_mask": torch.ones(2, 8, dtype=torch.long), "bbox": boxes}


def _decoder(config: Any) -> dict[str, Tensor]:
    return {"decoder_input_ids": _tokens(config, 2, 6)}


def _media(config: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 32
    sizes = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    if "pixel_values" in names:
        for shape in (sizes, (64, 64), (224, 224)):
            yield {"pixel_values": _draw(2, channels, *shape)}
        frames = getattr(vision, "num_frames", None) or 4
        yield {"pixel_values": _draw(1, frames, channels, *sizes)}
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": _draw(1, getattr(vision, "num_frames", None) or 4, channels, *sizes)}
    if "input_values" in names:
        yield {"input_values": _draw(2, 800)}
        yield {"input_values": _draw(2, 1, 1600)}
        yield {"input_values": _draw(2, getattr(config, "max_length", 16) or 16, getattr(config, "num_mel_bins", 16) or 16)}
    if "input_features" in names:
        audio = getattr(config, "audio_config", None) or config
        bins = getattr(audio, "num_mel_bins", None) or 16
        long = 2 * (getattr(audio, "max_source_positions", None) or 16)
        yield {"input_features": _draw(2, bins, long)}
        yield {"input_features": _draw(2, 64, bins)}
        yield {"input_features": _draw(2, 64, getattr(audio, "feature_projection_input_dim", None) or 16)}
    yield {}
