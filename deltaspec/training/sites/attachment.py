"""A method at work on a model: what it trains, stores and changes, and how it is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.architecture.peft_names import PREFIX
from deltaspec.errors import CheckpointError
from deltaspec.training.sites.adapted import Adapted, Update, check_free, wrap
from deltaspec.training.sites.model_sites import base_parameters, module_at
from deltaspec.training.sites.site import Site
from deltaspec.types import LowRankDelta
from deltaspec.types.methods import MethodOptions, PeftConfig


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a learning rate: ``factor`` times the loop's, and whether weight decay applies."""

    parameters: tuple[nn.Parameter, ...]
    factor: float = 1.0
    decay: bool = True


class Attachment:
    """One adapter on a model: an update at each site. Methods that act elsewhere override what differs.

    Parameters
    ----------
    model : nn.Module
        Its modules at the sites are wrapped; nothing of the base is written to.
    updates : sequence of Update
        One for each site.
    name : str
        Of the adapter, unlike any other on this model: letters, digits, - and _.
    method : str
        Its name in METHODS.
    options : dataclass
        The method's own.

    Attributes
    ----------
    updates : dict of str to Update
        By the names of their sites.
    shared : dict of str to Tensor
        What several updates have in common, by whole stored names.

    Raises
    ------
    OptionError
        If the name is taken or unusable, or the model's adapters are merged or mixed.
    """

    def __init__(
        self, model: nn.Module, updates: Sequence[Update] = (), *, name: str, method: str, options: MethodOptions
    ) -> None:
        self.model, self.name, self.method = model, name, method
        self.options: MethodOptions = options
        self.updates = {update.site.name: update for update in updates}
        self.shared = {name: tensor for update in updates for name, tensor in update.shared().items()}
        check_free(model, name)
        for update in updates:
            wrapper = wrap(model, update.site.path)
            slot = self.slot(update.site)
            wrapper.updates[slot] = update.train(wrapper.training)
            wrapper.active = (*wrapper.active, (slot, 1.0))

    @property
    def sites(self) -> list[Site]:
        """Where its updates are."""
        return [update.site for update in self.updates.values()]

    def slot(self, site: Site) -> str:
        """Name its update inside the wrapper of a module."""
        return f"{self.name}/{'' if site.whole else site.key.part}"

    def enable(self, weight: float) -> None:
        """Let it act with a weight: 1 wholly, 0 not at all (then it is not even run)."""
        check_free(self.model)
        for update in self.updates.values():
            wrapper = self.model.get_submodule(update.site.path)
            assert isinstance(wrapper, Adapted)
            slot = self.slot(update.site)
            rest = tuple(entry for entry in wrapper.active if entry[0] != slot)
            wrapper.active = (*rest, (slot, weight)) if weight else rest

    def detach(self) -> None:
        """Take it off; the last one gives the model its own modules back."""
        self.enable(0.0)
        for update in self.updates.values():
            wrapper = self.model.get_submodule(update.site.path)
            assert isinstance(wrapper, Adapted)
            del wrapper.updates[self.slot(update.site)]
            if not wrapper.updates:
                self.model.set_submodule(update.site.path, wrapper.base)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor it needs to go on, the parameters themselves, under PEFT's names where PEFT has them."""
        own = {
            f"{PREFIX}{name}.{suffix}": tensor
            for name, update in self.updates.items()
            for suffix, tensor in update.tensors().items()
        }
        return own | self.shared

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in; every one must be there and fit.

        Raises
        ------
        CheckpointError
            If one is missing, unknown, or of another shape.
        """
        fill(self.state(), tensors)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what the optimiser changes, by stored name; tied parameters once."""
        seen: dict[int, tuple[str, nn.Parameter]] = {}
        for name, tensor in self.state().items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                seen.setdefault(id(tensor), (name, tensor))
        return dict(seen.values())

    def groups(self) -> list[Group]:
        """Return what is trained by learning rate; one group unless the method says otherwise."""
        return [Group(tuple(self.trained().values()))]

    def stored(self) -> int:
        """Count what a released adapter holds, in numbers of four bytes."""
        return sum(parameter.numel() for parameter in self.trained().values())

    def released(self) -> dict[str, Tensor]:
        """Return the tensors of a released adapter by name; PEFT's format where PEFT has the method."""
        return self.state()

    def count_by_role(self) -> dict[str, int]:
        """Count trained numbers by the role of their site; what several share is under "shared"."""
        counts: dict[str, int] = {}
        owner = {id(t): u.site.key.role for u in self.updates.values() for t in u.tensors().values()}
        shared = {id(tensor) for tensor in self.shared.values()}
        for parameter in self.trained().values():
            role = "shared" if id(parameter) in shared else owner.get(id(parameter), "other")
            counts[role] = counts.get(role, 0) + parameter.numel()
        return counts

    def delta(self, site: Site) -> LowRankDelta | Tensor | None:
        """Return ΔW of one site in float64; None where the method does not change weights."""
        return self.updates[site.name].delta(module_at(self.model, site.path))


def freeze(model: nn.Module) -> None:
    """Stop gradients of all of the base's own parameters."""
    for parameter in base_parameters(model).values():
        parameter.requires_grad_(False)  # noqa: FBT003


def fill(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into a state of the same names and shapes.

    Raises
    ------
    CheckpointError
        If one is missing, unknown, or of another shape.
    """
    for what, names in (("lacks", state.keys() - tensors.keys()), ("has an unknown", tensors.keys() - state.keys())):
        if names:
            message = f"The adapter {what} tensor '{min(names)}' ({len(names)} such): it belongs to other options."
            raise CheckpointError(message)
    with torch.no_grad():
        for name, tensor in state.items():
            if tensor.shape != tensors[name].shape:
                message = (
                    f"The adapter's '{name}' has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}: "
                    "it belongs to another model or other options."
                )
                raise CheckpointError(message)
            tensor.copy_(tensors[name])


@dataclass(frozen=True, slots=True)
class Method:
    """One line of METHODS.

    Attributes
    ----------
    title, reference : str
        Its name in words, and its paper.
    options : type
        The dataclass of its options.
    attach : callable
        ``attach(model, sites, options, *, name, seed)`` puts the method on a model of transformers, at sites that
        ``choose_sites`` gave (none for a method that takes none), and returns an Attachment. Parameters are made in
        float32 on the device of their module, drawn by ``seed`` (on meta no values are); ``name`` is the adapter's on
        this model. It raises OptionError where options do not fit the model, and then leaves the model as it was.
    space : str
        "weight", "activation" or "base" (the base's own parameters are trained).
    sites : str
        Its default targets, "" where it takes none.
    identity : bool
        Whether the model's outputs are unchanged at the start.
    peft : str
        PEFT's name of the method, "" where PEFT has none.
    to_peft, from_peft : callable, optional
        ``to_peft(options)`` gives the fields of PEFT's config, ``from_peft(config, shapes)`` the options of a stored
        adapter.
    """

    title: str
    reference: str
    options: type
    attach: Callable[..., Attachment]
    space: str = "weight"
    sites: str = "all"
    identity: bool = True
    peft: str = ""
    to_peft: Callable[[Any], PeftConfig] | None = None
    from_peft: Callable[[PeftConfig, Mapping[str, tuple[int, ...]]], MethodOptions] | None = None


def make_parameter(
    shape: tuple[int, ...], like: Tensor, draw: Callable[[Tensor], object] | None = None
) -> nn.Parameter:
    """Make a float32 parameter on a tensor's device: drawn on the CPU, so that a seed gives the same everywhere.

    Parameters
    ----------
    shape : tuple of int
    like : Tensor
        Whose device it gets; on meta nothing is drawn.
    draw : callable, optional
        Fills a CPU tensor in place; zeros without.
    """
    if like.is_meta:
        return nn.Parameter(torch.empty(shape, device="meta"))
    values = torch.zeros(shape)
    if draw:
        draw(values)
    return nn.Parameter(values.to(like.device))
