"""A module of a running model with updates beside it; the base inside is never written to."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import OptionError
from deltaspec.training.sites.site import Site
from deltaspec.types import LowRankDelta, View

NAME = re.compile(r"[A-Za-z0-9_-]+")


class Update(nn.Module):
    """What one adapter adds at one site. Subclasses hold its parameters; the base weight is passed in, never held.

    Attributes
    ----------
    site : Site
    reads_base : bool
        Whether it needs the base's own outputs, not those with other adapters (DoRA, which stretches them).
    """

    reads_base = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def fuse(self, x: Tensor, *, base: nn.Module, weight: float) -> Tensor | None:
        """Return the whole module's outputs with the update in one go; None (the default) to run the base first."""
        del x, base, weight
        return None

    def forward(self, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
        """Return the site's outputs with the update.

        Parameters
        ----------
        x : Tensor, (…, d_in), or token ids (…) of an embedding
        y : Tensor, (…, d_out)
            The site's outputs so far, bias included; may be written to in place only if no gradient needs it.
        base : nn.Module
            The base's own module.
        weight : float
            How much of the update: 1 is all of it.
        """
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return lora_A (r, d_in) and lora_B (d_out, r), scaling included, differentiable; None if not low-rank."""
        return None

    def delta(self, base: nn.Module) -> LowRankDelta | Tensor | None:
        """Return ΔW (d_out, d_in) in float64: factors, or dense; None where the update is not one of weights."""
        del base
        pair = self.factors()
        return None if pair is None else LowRankDelta(pair[0].detach().double(), pair[1].detach().double())

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored of it, the parameters themselves, by the end of their stored names (PEFT's if any)."""
        raise NotImplementedError

    def shared(self) -> dict[str, Tensor]:
        """Return what it has in common with the adapter's other updates, by whole stored names; nothing by default."""
        return {}


class Adapted(nn.Module):
    """A module with the updates of any number of adapters, those in ``active`` at work in this order.

    ``run`` replaces the whole forward where it is set: merged weights, or a batch whose rows use different adapters.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()
        self.active: tuple[tuple[str, float], ...] = ()
        self.run: Callable[[Tensor], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that look at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        """Ask the base for whatever else a model looks at (in_features, padding_idx, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        """Run the base, then each active update on its rows."""
        if self.run is not None:
            return self.run(x)
        y: Tensor | None = None
        for slot, weight in self.active:
            update = self.updates[slot]
            assert isinstance(update, Update)
            if y is None:
                y = update.fuse(x, base=self.base, weight=weight)
                if y is None:
                    y = _apply(update, x, self.base(x), base=self.base, weight=weight)
            elif update.reads_base:
                start = self.base(x)
                y = y + (_apply(update, x, start, base=self.base, weight=weight) - start)
            else:
                y = _apply(update, x, y, base=self.base, weight=weight)
        return self.base(x) if y is None else y


def wrap(model: nn.Module, path: str) -> Adapted:
    """Put a module into an Adapted, or return the one that is there."""
    module = model.get_submodule(path)
    if isinstance(module, Adapted):
        return module
    wrapper = Adapted(module)
    wrapper.training = wrapper.updates.training = module.training
    model.set_submodule(path, wrapper)
    return wrapper


def _apply(update: Update, x: Tensor, y: Tensor, *, base: nn.Module, weight: float) -> Tensor:
    """Let an update change its rows of a module's outputs."""
    site = update.site
    if site.whole:
        changed: Tensor = update(x, y, base=base, weight=weight)
        return changed
    part = update(x, site.view.take(y, axis=-1), base=base, weight=weight)
    return put_outputs(y, part, site.view)


def check_free(model: nn.Module, name: str | None = None) -> None:
    """Refuse to change the adapters of a model while they are merged or mixed, and a name that is taken or unusable.

    Parameters
    ----------
    model : nn.Module
    name : str, optional
        Of an adapter that is to be attached.

    Raises
    ------
    OptionError
        Saying which.
    """
    if name is not None and not NAME.fullmatch(name):
        message = f"An adapter cannot have the name '{name}': expected letters, digits, - and _."
        raise OptionError(message)
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and module.run is not None:
            message = f"The adapters at '{path}' are merged, or mixed by row: call unmerge() or close() first."
            raise OptionError(message)
        if isinstance(module, Adapted) and any(slot.partition("/")[0] == name for slot in module.updates):
            message = f"There is an adapter '{name}' on '{path}' already: attach this one under another name."
            raise OptionError(message)


def apply_weight(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run a linear, Conv1D or embedding module with another weight.

    Parameters
    ----------
    module : nn.Module
        Its bias, padding and scale are used; it is not changed.
    x : Tensor, (…, d_in), or token ids (…) of an embedding
    weight : Tensor
        As the module stores it: (d_out, d_in), (d_in, d_out) for Conv1D, (V, d) for an embedding.

    Returns
    -------
    Tensor, (…, d_out)

    Examples
    --------
    >>> import torch
    >>> apply_weight(nn.Linear(2, 1, bias=False), torch.ones(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor([[7.]])
    """
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight, module.padding_idx) * getattr(module, "embed_scale", 1.0)
    return F.linear(x, weight if isinstance(module, nn.Linear) else weight.T, module.bias)  # type: ignore[arg-type]


def put_outputs(y: Tensor, part: Tensor, view: View) -> Tensor:
    """Return a fused module's outputs (…, d_out) with one part's (…, d_part) replaced; not in place.

    Examples
    --------
    >>> import torch
    >>> put_outputs(torch.zeros(4), torch.ones(2), View((2, 4), start=2, stop=4))
    tensor([0., 0., 1., 1.])
    """
    height, start, stop = view.split(y.shape[-1])
    grouped = y.reshape(*y.shape[:-1], view.groups, height)
    inside = part.reshape(*part.shape[:-1], view.groups, stop - start)
    return torch.cat([grouped[..., :start], inside, grouped[..., stop:]], dim=-1).flatten(-2)
