"""Methods that train parameters of the base itself: which they are, what they were, and how they get it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deltaspec.architecture.views import view_matrix
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import base_parameters, identify_parameters, list_sites, module_at
from deltaspec.training.sites.site import Site
from deltaspec.types.methods import MethodOptions


class TrainedInPlace:
    """Parameters of the base that are trained in place, and their originals.

    The originals are cloned when it is made, before gradients and moments take their memory, so that training's peak
    holds one copy more than it must; set ``originals`` to read them from elsewhere, such as the base checkpoint, and
    the clones are freed.

    Parameters
    ----------
    parameters : dict of str to nn.Parameter
        By their names in the running model, without adapters. They are trained in the dtype that they have.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.weight = 1.0
        self.set_aside: dict[str, Tensor] = {}
        self.originals: Callable[[str], Tensor] = {n: p.detach().clone() for n, p in parameters.items()}.__getitem__
        for parameter in parameters.values():
            parameter.requires_grad_(True)  # noqa: FBT003

    def original(self, name: str) -> Tensor:
        """Return what a parameter was, on its device."""
        return self.originals(name).to(self.parameters[name].device)

    @torch.no_grad()
    def enable(self, weight: float) -> None:
        """Move to original + weight · (trained − original); at 0 and 1 bit for bit. What was trained is kept aside."""
        if weight == self.weight:
            return
        for name, parameter in self.parameters.items():
            trained = self.set_aside.pop(name) if name in self.set_aside else parameter.detach().clone()
            if weight == 1:
                parameter.copy_(trained)
                continue
            original = self.original(name)
            parameter.copy_(original if weight == 0 else original + weight * (trained - original))
            self.set_aside[name] = trained
        self.weight = weight

    def values(self) -> dict[str, Tensor]:
        """Return the trained values by name: the parameters themselves, or what is kept aside for them."""
        return {**self.parameters, **self.set_aside}

    @torch.no_grad()
    def restore(self) -> None:
        """Give every parameter its original value, bit for bit, and stop its gradient."""
        for name, parameter in self.parameters.items():
            original = self.original(name)
            if parameter.dtype == original.dtype:
                parameter.copy_(original)
            else:
                parameter.data = original.clone()
            parameter.requires_grad_(False).grad = None  # noqa: FBT003
        self.set_aside = {}


class BaseAttachment(Attachment):
    """Parameters of the base in training, under their own names: what it stores is part of a whole checkpoint.

    They are trained in the dtype that they have: load the model in float32, in bfloat16 small steps are lost.

    Parameters
    ----------
    names : iterable of str
        Which, by their names in the running model; those that hold no floating-point numbers are left out.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], *, name: str, method: str, options: MethodOptions
    ) -> None:
        super().__init__(model, name=name, method=method, options=options)
        self.found, known = identify_parameters(model), base_parameters(model)
        chosen = set(names)
        self.base = TrainedInPlace({n: p for n, p in known.items() if n in chosen and p.is_floating_point()})
        by_id = {id(parameter): n for n, parameter in self.base.parameters.items()}
        sites = list_sites(model, split=True)
        weights = {site.path: by_id.get(id(module_at(model, site.path).weight)) for site in sites}
        self._names = {path: n for path, n in weights.items() if n is not None}
        homes = {n: path for path, n in reversed(self._names.items())}  # tied weights at their first module
        self._sites = [site for site in sites if homes.get(self._names.get(site.path, "")) == site.path]

    @property
    def sites(self) -> list[Site]:
        """The matrices that it trains, tied ones once, parts of fused ones one by one."""
        return self._sites

    @property
    def originals(self) -> Callable[[str], Tensor]:
        """Reads what a parameter was, by its name; setting another reader frees the clones."""
        return self.base.originals

    @originals.setter
    def originals(self, read: Callable[[str], Tensor]) -> None:
        self.base.originals = read

    def enable(self, weight: float) -> None:
        """Let the trained values act with a weight: base + weight · (trained − base), written into the base."""
        self.base.enable(weight)

    def detach(self) -> None:
        """Give the base its original values back, bit for bit."""
        self.base.restore()

    def state(self) -> dict[str, Tensor]:
        """Return the trained values by the base's own names."""
        return self.base.values()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what the optimiser changes."""
        return dict(self.base.parameters)

    def count_by_role(self) -> dict[str, int]:
        """Count trained numbers by role; a fused matrix by its parts, every bias under "bias"."""
        counts: dict[str, int] = {}
        for name, parameter in self.base.parameters.items():
            parts = [(found.key.role, math.prod(found.view.shape)) for found in self.found.matrices.get(name, ())]
            for role, count in parts or [(self.found.vectors[name].role, parameter.numel())]:
                counts[role] = counts.get(role, 0) + count
        return counts

    def delta(self, site: Site) -> Tensor:
        """Return trained − original (d_out, d_in), both in float64 before they are subtracted; zeros if not trained."""
        name = self._names.get(site.path)
        if name is None:
            return torch.zeros(site.shape, dtype=torch.float64)
        trained, original = self.base.values()[name].detach(), self.base.original(name)
        return view_matrix(trained, site.view).double() - view_matrix(original, site.view).double()
