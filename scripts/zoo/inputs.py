"""Example inputs by the names in forward's signature; many sets are tried, and the first that runs is taken."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
SEED, LENGTH = 1, 8
AUDIO_WIDTHS = ("num_mel_bins", "input_dim", "feature_size", "feature_projection_input_dim", "input_feat_per_channel")


def find_inputs(model: Any) -> Inputs | None:
    """Return inputs on which the model runs and says something finite; None if no try succeeds."""
    tried = set()
    for inputs in _tries(model):
        shape = str({name: tuple(value.shape) for name, value in inputs.items()})
        if shape in tried:
            continue
        tried.add(shape)
        try:
            if run(model, inputs):
                return inputs
        except Exception:
            continue
    return None


def run(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Run a model and return every finite floating tensor that comes out, by its place in the output."""
    names = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    settings = {"use_cache": False} if "use_cache" in names else {}
    torch.manual_seed(SEED)
    with torch.no_grad():
        found = dict(_floats(model(**inputs, **settings), ""))
    return {place: value.clone() for place, value in found.items() if bool(torch.isfinite(value).all())}


def repeats(one: Any, other: Any, inputs: Inputs) -> bool:
    """Tell whether two models of the same weights say the same thing; some draw numbers as they run."""
    try:
        first, second = run(one, inputs), run(other, inputs)
    except Exception:
        return False
    return (
        bool(first)
        and first.keys() == second.keys()
        and all(torch.allclose(value, second[place], rtol=1e-5, atol=1e-6) for place, value in first.items())
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


def _tries(model: Any) -> Iterator[Inputs]:
    """Yield sets of inputs, fullest first."""
    parameters = inspect.signature(model.forward).parameters
    names, config = set(parameters), model.config
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}
    text = {name: value for name, value in _text().items() if name in names}
    decoder = {"decoder_input_ids": tokens(2, 6)} if "decoder_input_ids" in names else {}
    extra = {name: value for name, value in _extra(config).items() if name in needed}
    for media in _media(config, names):
        yield {**extra, **text, **media, **decoder}
        yield {**extra, **media, **decoder}
        yield {**extra, **media}
    yield {**text, **decoder, **extra}
    yield {**text, **extra}
    books = getattr(config, "num_codebooks", None) or 1
    yield {"input_ids": tokens(2 * books, LENGTH), **extra}
    yield {"input_ids": tokens(2, LENGTH, books), **extra}


def draw(*shape: int) -> Tensor:
    """Return standard normal numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED))


def tokens(*shape: int) -> Tensor:
    """Return token ids that no model takes for special ones."""
    return torch.randint(3, 9, shape, generator=torch.Generator().manual_seed(SEED))


def _text() -> Inputs:
    boxes = torch.tensor([1, 2, 7, 9]).repeat(2, LENGTH, 1)
    return {
        "input_ids": tokens(2, LENGTH),
        "attention_mask": torch.ones(2, LENGTH, dtype=torch.long),
        "bbox": boxes,
        "qformer_input_ids": tokens(2, LENGTH),
    }


def _extra(config: Any) -> Inputs:
    """Return inputs that only some models insist on."""
    width = next((v for n in ("hidden_size", "d_model") if isinstance(v := getattr(config, n, None), int)), 16)
    return {
        "query_embeds": draw(2, 4, width),
        "input_features_mask": torch.ones(2, 64, dtype=torch.long),
        "visual_feats": draw(2, 4, getattr(config, "visual_feat_dim", 16)),
        "visual_pos": draw(2, 4, getattr(config, "visual_pos_dim", 4)),
        "hidden_states": draw(2, LENGTH, width),
        "inputs_embeds": draw(2, LENGTH, width),
        "encoder_hidden_states": draw(2, 4, width),
    }


def _media(config: Any, names: set[str]) -> Iterator[Inputs]:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or 32
    sizes = tuple(size) if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    if grids := [name for name in ("grid_thw", "image_grid_thw") if name in names]:
        yield from _patches(vision, grids[0], names)
    if "pixel_values" in names:
        for shape in (sizes, (64, 64), (224, 224)):
            yield {"pixel_values": draw(2, channels, *shape)}
        frames = getattr(vision, "num_frames", None) or 4
        for count in (frames, 2, 1):
            yield {"pixel_values": draw(1, count, channels, *sizes)}
    if "pixel_values_videos" in names:
        yield {"pixel_values_videos": draw(1, getattr(vision, "num_frames", None) or 4, channels, *sizes)}
    if "input_values" in names:
        bins = getattr(config, "num_mel_bins", None) or 16
        for shape in (
            (2, 800),
            (2, 1, 1600),
            (2, getattr(config, "max_length", None) or 16, bins),
            (2, 8000),
            (2, 64, bins),
        ):
            yield {"input_values": draw(*shape)}
    if "input_features" in names:
        yield from _features(config)
    yield {}


def _patches(vision: Any, grid: str, names: set[str]) -> Iterator[Inputs]:
    """Images cut into patches, flat, beside the grid that they come from."""
    patch = getattr(vision, "patch_size", 8)
    width = (
        3 * (getattr(vision, "temporal_patch_size", None) or 1) * (patch if isinstance(patch, int) else patch[0]) ** 2
    )
    place = "pixel_values" if "pixel_values" in names else "hidden_states"
    for numbers in (width, getattr(vision, "hidden_size", 16)):
        yield {place: draw(16, numbers), grid: torch.tensor([[1, 4, 4]])}
        yield {place: draw(1, 16, numbers), grid: torch.tensor([[1, 4, 4]])}


def _features(config: Any) -> Iterator[Inputs]:
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    long = 2 * (getattr(audio, "max_source_positions", None) or 32)
    widths = {v for part in (audio, config) for n in AUDIO_WIDTHS if isinstance(v := getattr(part, n, None), int)} | {
        16
    }
    for width in sorted(widths, reverse=True):
        yield {"input_features": draw(2, width, long)}
        yield {"input_features": draw(2, 64, width)}
        yield {"input_features": draw(2, 1, 64, width)}
        yield {"input_features": draw(2, width, long), "input_features_mask": torch.ones(2, long, dtype=torch.long)}
        yield {"input_features": draw(2, 64, width), "input_features_mask": torch.ones(2, 64, dtype=torch.long)}
