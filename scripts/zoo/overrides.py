"""Configurations that the rules do not get right: model type → fields that replace what they gave."""

from __future__ import annotations

from typing import Any

EFFICIENTNET = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {"vision_config": EFFICIENTNET},
    "autoformer": SERIES,
    "efficientnet": EFFICIENTNET,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32, "token_dropout": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "informer": SERIES,
    "time_series_transformer": SERIES,
}
