"""A config and a method → how many numbers are trained, stored and held, without any weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltaspec.architecture.roles import order_roles
from deltaspec.errors import OptionError
from deltaspec.options.recipe import OptionValue, Recipe, check_recipe
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import base_parameters
from deltaspec.training.sites.site import Site
from deltaspec.training.sites.targets import LeftOut, choose_sites, list_left_out
from deltaspec.types.methods import MethodOptions
from deltaspec.workflows.shared.meta_models import build_skeleton, describe_skeleton, list_head


@dataclass(frozen=True, slots=True)
class RoleCount:
    """What is trained for one role: of so many matrices, of these shapes (d_out, d_in)."""

    role: str
    matrices: int
    shapes: tuple[tuple[int, int], ...]
    trainable: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters; tied weights count once.

    ``trainable`` is what the optimiser changes for the method, ``head`` a classifier's own parameters, which are
    trained beside it; ``stored`` is what a released adapter holds without the head, in numbers of four bytes (of
    VB-LoRA what --save-topk releases), and ``released`` what it holds under the options that are given;
    ``total`` is the model with all that the method adds. ``left_out`` are matrices that the targets mean and the
    method cannot adapt, such as stacked experts.
    """

    trainable: int
    head: int
    stored: int
    total: int
    roles: tuple[RoleCount, ...]
    method: str
    model: str
    released: int
    left_out: tuple[LeftOut, ...] = ()

    @property
    def bytes(self) -> dict[str, int]:
        """A released adapter and its head in fp32, and AdamW's two moments of all that is trained."""
        return {"stored": 4 * self.stored, "head": 4 * self.head, "optimizer": 8 * (self.trainable + self.head)}


def count(ref: str | Path, recipe: Recipe | None = None, *, task: str = "", labels: int = 0) -> Counts:
    """Count what a method would train on a model, from its config alone.

    Parameters
    ----------
    ref : str or Path
        A folder with a config.json, such a file, or a hub id, of which only config.json is fetched.
    recipe : Recipe, optional
        Of which ``method``, ``method_options`` and ``targets`` count; LoRA by default.
    task : str
        ``classification`` or ``causal-lm``: with the head that the task needs; empty takes what the config names.
    labels : int
        Classes of a classification; 0 leaves what the config says.

    Returns
    -------
    Counts

    Raises
    ------
    CheckpointError
        If there is no config, or transformers does not know it.
    OptionError
        If method, options, targets or task make no sense for this model.
    MissingPackageError
        If transformers is not installed.
    """
    recipe = Recipe() if recipe is None else check_recipe(recipe)
    chosen = make_options(recipe.method, recipe.method_options)
    model = build_skeleton(describe_skeleton(ref, task=task, labels=labels))
    sites = choose_method_sites(model, recipe.method, recipe.targets)
    attachment = METHODS[recipe.method].attach(model, sites, chosen, name="default", seed=0)
    return count_parameters(model, attachment, targets=recipe.targets)


def make_options(method: str, options: Mapping[str, OptionValue]) -> MethodOptions:
    """Make a method's options from those that were given.

    Raises
    ------
    OptionError
        If there is no such method, it has no such option, or a value makes no sense.
    """
    if method not in METHODS:
        message = f"--method is '{method}': expected one of {', '.join(METHODS)}."
        raise OptionError(message)
    known = [field.name for field in fields(METHODS[method].options)]
    if unknown := [name for name in options if name not in known]:
        message = f"'{unknown[0]}' does not belong to the method {method}: it takes {', '.join(known) or 'no options'}."
        raise OptionError(message)
    made: MethodOptions = METHODS[method].options(**options)
    return made


def choose_method_sites(model: nn.Module, method: str, targets: TargetOptions) -> list[Site]:
    """Choose the matrices that a method changes: those asked for, else its own; none where it takes none.

    Raises
    ------
    OptionError
        If targets match nothing, or are given to a method that takes none.
    """
    own = METHODS[method].sites
    if own:
        return choose_sites(model, replace(targets, targets=targets.targets or own))
    if targets != TargetOptions():
        message = f"--targets, --depths and --split do not belong to --method {method}: it is not a method of matrices."
        raise OptionError(message)
    return []


def count_parameters(model: nn.Module, attachment: Attachment, *, targets: TargetOptions | None = None) -> Counts:
    """Count what an attachment trains, stores and adds, on any device.

    Parameters
    ----------
    model : nn.Module
        With the attachment on it.
    attachment : Attachment
    targets : TargetOptions, optional
        What was asked for: with it, what of this is left out gets listed.
    """
    method, left_out = METHODS[attachment.method], list[LeftOut]()
    if targets and method.sites and method.space == "weight":
        left_out = list_left_out(model, replace(targets, targets=targets.targets or method.sites))
    trained = attachment.trained().values()
    added = [tensor for tensor in attachment.state().values() if isinstance(tensor, nn.Parameter)]
    return Counts(
        trainable=_total(trained),
        head=_total(list_head(model).values(), without=trained),
        stored=attachment.stored(),
        total=_total([*base_parameters(model).values(), *added]),
        roles=_count_roles(attachment),
        method=attachment.method,
        model=type(model).__name__,
        released=sum(tensor.numel() * tensor.element_size() for tensor in attachment.released().values()) // 4,
        left_out=tuple(left_out),
    )


def _total(tensors: Iterable[Tensor], *, without: Iterable[Tensor] = ()) -> int:
    left_out = {id(tensor) for tensor in without}
    return sum({id(tensor): tensor.numel() for tensor in tensors if id(tensor) not in left_out}.values())


def _count_roles(attachment: Attachment) -> tuple[RoleCount, ...]:
    """List roles in their order, then what belongs to none of them."""
    counts = attachment.count_by_role()
    shapes: dict[str, list[tuple[int, int]]] = {role: [] for role in counts}
    for site in attachment.sites:
        shapes.setdefault(site.key.role, []).append(site.shape)
    return tuple(
        RoleCount(role, len(shapes[role]), tuple(dict.fromkeys(shapes[role])), counts.get(role, 0))
        for role in order_roles(shapes)
    )


def describe_left_out(left_out: Iterable[LeftOut]) -> str:
    """Say in one line without full stop what targets leave out, all blocks together; "" where that is nothing.

    Examples
    --------
    >>> left = [LeftOut(f"h.{n}.experts", (4, 8, 2), ("up_proj",), n, "experts stacked") for n in range(3)]
    >>> describe_left_out(left)
    'Left out: 192 parameters, in h.*.experts (3 of 4 × 8 × 2): experts stacked'
    """
    alike: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for one in left_out:
        pattern = one.tensor if one.depth is None else re.sub(rf"\.{one.depth}\.", ".*.", one.tensor, count=1)
        key = (one.reason, pattern, one.shape)
        alike[key] = alike.get(key, 0) + 1
    said: dict[str, list[str]] = {}
    for (reason, pattern, shape), number in alike.items():
        said.setdefault(reason, []).append(f"{pattern} ({number} of {' × '.join(map(str, shape))})")
    total = sum(number * math.prod(shape) for (_, _, shape), number in alike.items())
    text = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in said.items())
    return f"Left out: {total:,} parameters, in {text}" if text else ""


def counts_to_json(counts: Counts) -> dict[str, Any]:
    """Return what ``deltaspec count --json`` prints: the fields of Counts, and its ``bytes``."""
    return {**asdict(counts), "bytes": counts.bytes}
