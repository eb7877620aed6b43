"""Roles, names and depths → the sites that a method changes, and the matrices that it cannot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from deltaspec.architecture.roles import order_roles
from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.sites.model_sites import base_parameters, identify_parameters, list_modules, list_sites
from deltaspec.training.sites.site import Site

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A parameter with matrices that targets mean, and that is no layer's weight: no site holds it."""

    tensor: str
    shape: tuple[int, ...]
    roles: tuple[str, ...]
    depth: int | None
    reason: str


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
    for piece in _read_targets(options.targets):
        found = [site for site in parts if _meets(site, piece)] or [site for site in whole if _meets(site, piece)]
        if not found:
            raise OptionError(_say_unmatched(model, piece, parts))
        chosen |= {site.name: site for site in found}
    kept = {name: site for name, site in chosen.items() if depths is None or site.key.depth in depths}
    if not kept:
        message = f"--depths is '{options.depths}', which leaves no layer of --targets: this model has {blocks} blocks."
        raise OptionError(message)
    return _in_order(whole, parts, kept, split=options.split)


def list_left_out(model: nn.Module, options: TargetOptions) -> list[LeftOut]:
    """List the matrices that targets mean and no method of layers can adapt: stacked experts, bare parameters.

    Parameters
    ----------
    model : nn.Module
        Of transformers, on any device (meta too).
    options : TargetOptions
        ``all`` means every matrix of the blocks.

    Returns
    -------
    list of LeftOut
        In the model's order.

    Raises
    ------
    OptionError
        If the depths cannot be read, or a regular expression makes no sense.
    """
    whole = list_sites(model, split=False)
    left = _list_bare(model, whole)
    deepest = [key for key in (*(site.key.depth for site in whole), *(one.depth for one in left)) if key is not None]
    depths = _read_depths(options.depths, 1 + max(deepest, default=-1))
    pieces = _read_targets(options.targets)
    meant = [one for one in left if any(_means(one, piece) for piece in pieces)]
    return [one for one in meant if depths is None or one.depth in depths]


def _list_bare(model: nn.Module, whole: Sequence[Site]) -> list[LeftOut]:
    """List every parameter that holds matrices and belongs to no site."""
    held, parameters, modules = {site.key.tensor for site in whole}, base_parameters(model), dict(list_modules(model))
    left = []
    for name, found in identify_parameters(model).matrices.items():
        if name in held:
            continue
        roles, key = tuple(dict.fromkeys(identified.key.role for identified in found)), found[0].key
        reason = f"a parameter of {type(modules.get(name.rpartition('.')[0])).__name__}, which is no linear layer"
        if key.expert is not None:
            reason = "experts stacked in one parameter, which is no linear layer"
        left.append(LeftOut(name, tuple(parameters[name].shape), roles, key.depth, reason))
    return left


def _means(left: LeftOut, piece: str) -> bool:
    """Tell whether one of the targets would take this parameter, were it a layer's weight."""
    if piece == "all":
        return left.depth is not None
    if piece in GROUPS:
        return left.depth is not None and not set(GROUPS[piece]).isdisjoint(left.roles)
    owner, _, leaf = left.tensor.rpartition(".")
    if _is_name(piece):
        return piece in (*left.roles, leaf, owner.rpartition(".")[2])
    return any(_compile(piece).fullmatch(path) for path in (owner, left.tensor))


def _say_unmatched(model: nn.Module, piece: str, parts: Sequence[Site]) -> str:
    """Say why one of the targets matches no layer."""
    left = next((one for one in _list_bare(model, list_sites(model, split=False)) if _means(one, piece)), None)
    if left:
        shape = " × ".join(map(str, left.shape))
        return (
            f"--targets has '{piece}', which matches no layer: '{left.tensor}' ({shape}) and what is like it cannot be "
            f"adapted, being {left.reason}; pass other --targets, or --method full."
        )
    roles = order_roles(site.key.role for site in parts)
    inside, hint = [site.path for site in parts if site.key.depth is not None], ""
    if inside and not _is_name(piece):
        hint = f"; a regular expression must match a whole path such as '{inside[0]}'"
    return f"--targets has '{piece}', which matches no layer: this model has the roles {', '.join(roles)}{hint}."


def _read_targets(text: str) -> list[str]:
    """Part a list of names; a regular expression, which may hold commas, is one."""
    pieces = [piece.strip() for piece in text.split(",")]
    return pieces if all(_is_name(piece) for piece in pieces) else [text]


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
