"""The controlled vocabulary of module roles; the same names for every family, in the order in which they are shown."""

from __future__ import annotations

ROLES: dict[str, str] = {
    "q_proj": "attention queries",
    "k_proj": "attention keys",
    "v_proj": "attention values",
    "qkv_proj": "queries, keys and values in one matrix that could not be split",
    "o_proj": "attention output",
    "gate_proj": "the feed-forward branch that passes through the activation of a gated unit",
    "up_proj": "feed-forward input, to the wider side",
    "gate_up_proj": "gate and up in one matrix that could not be split",
    "down_proj": "feed-forward output, back to the narrower side",
    "router": "scores that choose experts, or weigh a shared one",
    "embed": "token embedding",
    "position_embed": "learned positions, absolute or relative, or their projection",
    "token_type_embed": "segment embedding",
    "time_embed": "diffusion step (and size) embedding",
    "conv": "convolution kernel, flattened to (out, in·k·k)",
    "proj_in": "projection into a stack's width",
    "proj_out": "projection out of a stack's width",
    "projection": "projection between spaces: modalities, or before a head",
    "pooler": "projection of the pooled state",
    "classifier": "task head",
    "lm_head": "hidden state to vocabulary",
    "norm": "scale or shift of a normalisation",
    "bias": "additive vector",
    "other": "none of the above, or unknown",
}

ORDER: tuple[str, ...] = tuple(ROLES)
