"""Configurations that the rules do not get right: model type → fields that replace what they gave."""

from __future__ import annotations

from typing import Any

EFFICIENTNET = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
LAST = {"start": {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}}
THREE = {"start": {"backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}}}
MAPS = {"<image>": 50, **{f"IMGIMG{letter}Z": 51 + i for i, letter in enumerate("ABCDEF")}}
EMU = {"<image>": 50, "<|extra_200|>": 49, **{f"<|visual token {i:06d}|>": 51 + i for i in range(8)}}
SECTIONS = {"rope_parameters": {"mrope_section": [2, 1, 1]}}
HALVES = {"rope_parameters": {"mrope_section": [1, 1, 0]}}
OVERRIDES: dict[str, dict[str, Any]] = {  # "start": what the configuration is made from before it shrinks
    "align": {"vision_config": EFFICIENTNET},
    "autoformer": SERIES,
    "chameleon": {"vocabulary_map": MAPS},
    "conditional_detr": LAST,
    "dab-detr": LAST,
    "dbrx": {"attn_config": {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deformable_detr": THREE,
    "detr": LAST,
    "efficientnet": EFFICIENTNET,
    "emu3": {"vocabulary_map": EMU, "vq_config": {"base_channels": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "token_dropout": False},
    **{name: {"text_config": SECTIONS} for name in ("glm46v", "glm4v", "glm_image", "glm_ocr", "glmga", "colqwen2")},
    **dict.fromkeys(("glm4v_text", "glm_image_text", "glm_ocr_text"), SECTIONS),
    "glm4v_moe": {"text_config": HALVES},
    "glm4v_moe_text": HALVES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8, "layer_types": ["linear_attention", "full_attention"]},
    "informer": SERIES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "omdet-turbo": THREE,
    **{name: {"image_size": 128} for name in ("swin", "donut-swin", "maskformer-swin")},
    "table-transformer": LAST,
    "time_series_transformer": SERIES,
    "timm_backbone": {"backbone": "test_resnet", "out_indices": [1, 2, 3, 4]},
    "timm_wrapper": {"architecture": "test_vit"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}
