"""Tiny transformers models of the families in families.toml: the fixture's config plus what running them needs."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tests.families import FAMILIES

LAYERS = {"max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}
IMAGE = 47  # the token that stands for a piece of an image
TOP2 = {"num_experts_per_tok": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "llava": {"text_config": LAYERS, "image_token_index": IMAGE, "image_seq_length": 4},
    "gemma3_multimodal": {"text_config": LAYERS, "image_token_index": IMAGE},
    "qwen2_vl": {"text_config": {**LAYERS, "rope_parameters": ROPE}, "image_token_id": IMAGE},
    "phi3": TOKENS,
    "roberta": TOKENS,
    "modernbert": {**TOKENS, "cls_token_id": 1, "sep_token_id": 2},
    "whisper": {**TOKENS, "decoder_start_token_id": 1},
    "clip": {"text_config": {"projection_dim": 20, "eos_token_id": 2}, "vision_config": {"projection_dim": 20}},
    "qwen2_moe": TOP2,
    "qwen3_moe": TOP2,
    "qwen3_moe_stacked": TOP2,
    "gpt_oss": TOP2,
    "llama4": {"pad_token_id": 0},
}
BUILT = [name for name in FAMILIES if name != "unet"]


def _merged(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Join two nested dicts."""
    joined = {**config, **extra}
    for key in config.keys() & extra.keys():
        if isinstance(config[key], dict):
            joined[key] = _merged(config[key], extra[key])
    return joined


def build(name: str, *, seed: int = 0) -> Any:
    """Make a family's model in fp32, every weight random, so that no zero or one hides an error."""
    import transformers

    family = FAMILIES[name]
    config = transformers.AutoConfig.for_model(**_merged(family.config, {**LAYERS, **EXTRA.get(name, {})}))
    torch.manual_seed(seed)
    model = getattr(transformers, family.config["architectures"][0])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Ids, pixels or sound, as the model's forward takes them."""
    generator = torch.Generator().manual_seed(7)
    names = inspect.signature(model.forward).parameters
    given: dict[str, torch.Tensor] = {}
    if "input_features" in names:
        given["input_features"] = torch.randn(2, 10, 32, generator=generator)
    elif "input_ids" in names:
        given["input_ids"] = torch.randint(3, 40, (2, 9), generator=generator)
        given["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = torch.randint(3, 40, (2, 6), generator=generator)
    if "image_grid_thw" in names:  # four patches of two frames, merged into one token an image
        given["pixel_values"] = torch.randn(8, 3 * 2 * 4 * 4, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
        given["mm_token_type_ids"] = torch.zeros(2, 9, dtype=torch.long)
        given["mm_token_type_ids"][:, 1] = 1
        given["input_ids"][:, 1] = IMAGE
    elif "pixel_values" in names:
        given["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
        if hasattr(model.config, "image_token_id"):
            given["input_ids"][:, 1:5] = IMAGE
    return given
