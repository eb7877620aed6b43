"""Tiny models of diffusers and timm: their classes have no defaults to shrink, so each is spelled out here."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
LATENTS, TEXT = (1, 4, 8, 8), (1, 6, 16)
BLOCKS = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
UNET = {**BLOCKS, "down_block_types": DOWN, "up_block_types": UP, "cross_attention_dim": 16, "attention_head_dim": 2}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
DIT = {**HEADS, "in_channels": 4, "sample_size": 8, "patch_size": 2, "num_layers": 2}
PIXELS = {"in_channels": 4, "patch_size": 2, "num_layers": 2, **HEADS}
WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 24, "num_layers": 2}
DIFFUSERS: dict[str, tuple[dict[str, Any], Shapes]] = {  # class, configuration, shapes of its inputs
    "UNet2DConditionModel": (UNET, {"sample": LATENTS, "timestep": (1,), "encoder_hidden_states": TEXT}),
    "UNet2DModel": (
        {**BLOCKS, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4},
        {"sample": LATENTS, "timestep": (1,)},
    ),
    "ControlNetModel": (
        {"in_channels": 4, "down_block_types": DOWN, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2, "conditioning_embedding_out_channels": (4, 8)},
        {"sample": LATENTS, "timestep": (1,), "encoder_hidden_states": TEXT, "controlnet_cond": (1, 3, 16, 16)},
    ),
    "AutoencoderKL": (
        {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4},
        {"sample": (1, 3, 16, 16)},
    ),
    "VQModel": ({"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 16}, {"sample": (1, 3, 16, 16)}),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        {"sample": (1, 3, 16, 16)},
    ),
    "FluxTransformer2DModel": (
        {**HEADS, "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 2, 2)},
        {"hidden_states": (1, 16, 4), "encoder_hidden_states": TEXT, "pooled_projections": (1, 16), "timestep": (1,), "img_ids": (16, 3), "txt_ids": (6, 3)},
    ),
    "SD3Transformer2DModel": (
        {**DIT, "out_channels": 4, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
        {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "pooled_projections": (1, 16), "timestep": (1,)},
    ),
    "PixArtTransformer2DModel": (
        {**DIT, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16, "use_additional_conditions": False},
        {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "timestep": (1,)},
    ),
    "SanaTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, **HEADS, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 8},
        {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "timestep": (1,)},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1, **HEADS, "joint_attention_dim": 16, "caption_projection_dim": 16, "pos_embed_max_size": 16, "out_channels": 4},
        {"hidden_states": LATENTS, "encoder_hidden_states": TEXT, "timestep": (1,)},
    ),
    "CogVideoXTransformer3DModel": (
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6},
        {"hidden_states": (1, 2, 4, 8, 8), "encoder_hidden_states": TEXT, "timestep": (1,)},
    ),
    "WanTransformer3DModel": (WAN, {"hidden_states": (1, 4, 1, 8, 8), "encoder_hidden_states": TEXT, "timestep": (1,)}),
    "QwenImageTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, **HEADS, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2)}, {},
    ),
    "HunyuanDiT2DModel": ({**PIXELS, "sample_size": 8, "hidden_size": 16, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 4, "text_len_t5": 4}, {}),
    "DiTTransformer2DModel": ({**DIT, "out_channels": 8, "num_embeds_ada_norm": 10}, {}),
    "LTXVideoTransformer3DModel": ({"in_channels": 4, "out_channels": 4, **HEADS, "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16}, {}),
    "UNetMotionModel": ({**BLOCKS, "cross_attention_dim": 16, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 8}, {}),
    "UNetSpatioTemporalConditionModel": ({"sample_size": 8, "in_channels": 8, "out_channels": 4, "block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "layers_per_block": 1, "cross_attention_dim": 16, "num_attention_heads": 2, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24}, {}),
    "PriorTransformer": ({**HEADS, "num_layers": 2, "embedding_dim": 16, "num_embeddings": 4, "additional_embeddings": 4}, {}),
}  # fmt: skip
TIMM = (
    *("test_vit", "test_vit2", "test_vit3", "test_vit4", "test_convnext", "test_convnext2", "test_convnext3"),
    *("test_resnet", "test_efficientnet", "test_efficientnet_gn", "test_byobnet", "test_nfnet", "test_mambaout"),
)


def list_others() -> dict[str, str]:
    """Map names of models that are no transformers' to the library that has them, where it is installed."""
    found = {}
    for library, names in (("diffusers", DIFFUSERS), ("timm", TIMM)):
        if importlib.util.find_spec(library):
            found |= {f"{library}:{name}": library for name in names}
    return found


def build_other(library: str, name: str) -> tuple[Any, dict[str, Tensor] | None]:
    """Build a tiny model of diffusers or timm, and inputs where they are known."""
    torch.manual_seed(0)
    if library == "timm":
        return TimmFolder(name).create({}).eval(), {"x": torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1))}
    config, shapes = DIFFUSERS[name]
    model = getattr(importlib.import_module("diffusers"), name)(**config).eval()
    generator = torch.Generator().manual_seed(1)
    inputs = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if "timestep" in inputs:
        inputs["timestep"] = torch.tensor([3])
    return model, inputs or None


@dataclass(frozen=True)
class TimmFolder:
    """What stands for a class: loads and saves a folder as timm does for the hub."""

    name: str

    def create(self, options: dict[str, Any]) -> Any:
        """Make the model, which can save itself."""
        timm = importlib.import_module("timm")
        model = timm.create_model(self.name, pretrained=False, num_classes=4, **options)
        model.save_pretrained = functools.partial(self._save, model)
        return model

    def from_pretrained(self, folder: Path) -> Any:
        """Load a folder."""
        from safetensors.torch import load_file

        assert json.loads((folder / "config.json").read_text())["architecture"] == self.name
        model = self.create({})
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    @staticmethod
    def _save(model: Any, folder: Path, **_: object) -> None:
        hub = importlib.import_module("timm.models._hub")
        hub.save_for_hf(model, str(folder), safe_serialization=True)
