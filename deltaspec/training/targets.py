"""Roles, names and depths → the sites that a method changes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from deltaspec.architecture.roles import ROLES
from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.sites import Site, list_sites

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}


def choose_sites(model: nn.Module, options: TargetOptions) -> list[Site]:
    """Choose the matrices that a method changes.

    A fused matrix is one site where all its parts are meant and ``split`` is not set, else one for each part meant.

    Parameters
    ----------
    model : nn.Module
        Of transformers, on any device (meta too).
    options : TargetOptions

    Raises
    ------
    OptionError
        If one of the targets, or the depths, match nothing.
    """
    whole, parts = list_sites(model, split=False), list_sites(model, split=True)
    blocks = 1 + max((site.key.depth for site in whole if site.key.depth is not None), default=-1)
    depths = _read_depths(options.depths, blocks)
    chosen: dict[str, Site] = {}
    pieces = [piece.strip() for piece in options.targets.split(",")]
    if not all(_is_name(piece) for piece in pieces):
        pieces = [options.targets]  # a regular expression may hold commas
    for piece in pieces:
        found = [site for site in parts if _meets(site, piece)] or [site for site in whole if _meets(site, piece)]
        if not found:
            roles = sorted({site.key.role for site in parts}, key=list(ROLES).index)
            message = f"--targets has '{piece}', which matches no layer: this model has the roles {', '.join(roles)}."
            raise OptionError(message)
        chosen |= {site.name: site for site in found}
    kept = {name: site for name, site in chosen.items() if depths is None or site.key.depth in depths}
    if not kept:
        message = f"--depths is '{options.depths}', which leaves no layer of --targets: this model has {blocks} blocks."
        raise OptionError(message)
    return _in_order(whole, parts, kept, split=options.split)


def _is_name(piece: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_]+", piece) is not None


def _meets(site: Site, piece: str) -> bool:
    linear, key = site.kind != "embedding", site.key
    if piece == "all":
        return linear and key.depth is not None
    if piece in GROUPS:
        return linear and key.depth is not None and key.role in GROUPS[piece]
    if _is_name(piece):
        return piece in (key.role, site.path.rpartition(".")[2])
    return _compile(piece).fullmatch(site.path) is not None


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as cause:
        message = f"--targets is '{pattern}', neither a list of roles nor a regular expression: {cause}."
        raise OptionError(message) from cause


def _read_depths(text: str, blocks: int) -> set[int] | None:
    """Read block indices such as 0-5,11 and -4: ; None means all."""
    if not text:
        return None
    every, depths = list(range(blocks)), set[int]()
    for piece in (part.strip() for part in text.split(",")):
        if ":" in piece:
            start, stop = (int(side) if side else None for side in piece.split(":"))
            depths |= set(every[start:stop])
        elif "-" in piece[1:]:
            first, last = piece.split("-")
            depths |= set(range(int(first), int(last) + 1))
        else:
            depths.add(int(piece) + (blocks if int(piece) < 0 else 0))
    return depths


def _in_order(whole: Sequence[Site], parts: Sequence[Site], kept: dict[str, Site], *, split: bool) -> list[Site]:
    """Return the chosen sites in the model's order, parts joined where all of a module are meant."""
    sites = []
    for site in whole:
        mine = [part for part in parts if part.path == site.path]
        meant = [part for part in mine if part.name in kept]
        if not split and (site.name in kept or len(meant) == len(mine)):
            sites.append(site)
        else:
            sites += meant
    return sites
