"""The controlled vocabulary of module roles; the same names for every family, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Iterable

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


def fused_role(parts: Iterable[str], *, otherwise: str) -> str:
    """Name a fused matrix as a whole by the roles of its parts.

    Parameters
    ----------
    parts : iterable of str
        Roles, in any order.
    otherwise : str
        Of anything but queries with keys and values, or gate with up: keys with values alone, or unknown parts.

    Examples
    --------
    >>> fused_role(["up_proj", "gate_proj"], otherwise="other")
    'gate_up_proj'
    >>> fused_role(["k_proj", "v_proj"], otherwise="k_proj")
    'k_proj'
    """
    roles = set(parts)
    return "gate_up_proj" if "gate_proj" in roles else "qkv_proj" if "q_proj" in roles else otherwise
