"""The controlled vocabulary of module roles, the same names for every family; what it lacks is called as in the model.

Roles outside it are names from files: untrusted, and to be cleaned where they are printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
    "other": "none of the above; a matrix that is in no family has its module's own name for a role",
}

ORDER: tuple[str, ...] = tuple(ROLES)
GROUPED = "other ("
MOST = 30  # rows of unknown roles in a table or figure, at most
# Also where torch keeps a weight in pieces: weight_g and weight_v, or a parametrization's originals.
WEIGHT = re.compile(r"\.(?:parametrizations\.)?weight(?:_[gv]|\.original[0-9]?)?$")


def own_role(tensor: str) -> str:
    """Name the role of a matrix that no family knows: what its module is called, numbers left out.

    A name that the vocabulary holds says there what the code relies on, so that it becomes "other".

    Examples
    --------
    >>> own_role("blocks.3.mixer.W_out.weight"), own_role("net.2.weight"), own_role("layers.0.experts.7.lin_v.weight")
    ('W_out', 'net', 'lin_v')
    >>> own_role("blocks.3.W1"), own_role("aux.embed.weight")
    ('W1', 'other')
    """
    pieces = WEIGHT.sub("", tensor).split(".")
    name = next((piece for piece in reversed(pieces) if piece and not piece.isdecimal()), "other")
    return "other" if name in ROLES else name


def order_roles(roles: Iterable[str]) -> list[str]:
    """Return each role once: the vocabulary's in its order, then unknown ones, W2 before W10, then those grouped."""
    return sorted(set(roles), key=_place)


def _place(role: str) -> tuple[int, list[tuple[int, str]]]:
    if role in ROLES:
        return ORDER.index(role), []
    pieces = re.split(r"([0-9]{1,18})", role)
    natural = [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
    return len(ORDER) + role.startswith(GROUPED), natural


def group_rare(counts: Mapping[str, int]) -> dict[str, str]:
    """Map each role to the one under which a table or figure lists it: itself, or one for all rare unknown ones.

    Parameters
    ----------
    counts : mapping
        Role → how many matrices have it.

    Returns
    -------
    dict
        The vocabulary's roles stay, and so do unknown ones up to ``MOST``; of more the most frequent stay, and the
        rest is "other (12 names)", so that there are ``MOST`` again.
    """
    unknown = sorted((role for role in order_roles(counts) if role not in ROLES), key=lambda role: -counts[role])
    rest = unknown[MOST - 1 :] if len(unknown) > MOST else []
    return {role: role for role in counts} | dict.fromkeys(rest, f"{GROUPED}{len(rest)} names)")


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
