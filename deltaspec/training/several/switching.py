"""Several adapters on one model: which act and how strongly, and merged weights beside a base that stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from deltaspec.errors import DeltaspecError, OptionError
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.adapted import Adapted, Update, apply_weight, check_free, put_outputs
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import base_bias, kind_of
from deltaspec.types import LowRankDelta


class Merged(nn.Module):
    """A module run with another weight, its outputs moved by ``shift`` (d_out,); None leaves either as it is."""

    base: nn.Module
    weight: Tensor | None
    shift: Tensor | None

    def __init__(self, base: nn.Module, weight: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)  # its wrapper's, not a second time this one's
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the base's own forward with the merged weight."""
        y: Tensor = self.base(x) if self.weight is None else apply_weight(self.base, x, self.weight)
        return y if self.shift is None else y + self.shift


class Adapters:
    """The adapters of one model: switched, weighted, merged and taken off, in any order, without loading anything.

    Parameters
    ----------
    model : nn.Module
    attachments : iterable of Attachment, or mapping to them
        On this model, each with a name of its own; all act, as they do when they have been attached.
    """

    def __init__(self, model: nn.Module, attachments: Iterable[Attachment] | Mapping[str, Attachment] = ()) -> None:
        self.model = model
        self.attachments: dict[str, Attachment] = {}
        self.active: dict[str, float] = {}
        self._merged: list[Adapted] = []
        for attachment in attachments.values() if isinstance(attachments, Mapping) else attachments:
            self.add(attachment)

    def add(self, attachment: Attachment) -> None:
        """Take in one that has been attached; it acts with weight 1, after those that act already.

        Raises
        ------
        OptionError
            If there is one of its name.
        """
        if attachment.name in self.attachments:
            message = f"There is an adapter '{attachment.name}' already: attach this one under another name."
            raise OptionError(message)
        self.attachments[attachment.name] = attachment
        self.active[attachment.name] = 1.0

    def activate(self, weights: Mapping[str, float]) -> None:
        """Let exactly these adapters act, in this order, with these weights; one of weight 0 does not.

        Raises
        ------
        OptionError
            If a name is unknown, a method cannot act in part, or adapters are merged; then nothing has changed.
        """
        for name in weights:
            self._find(name)
        check_free(self.model)
        before = dict(self.active)
        try:
            self._enable(weights)
        except DeltaspecError:
            self._enable(before)
            raise

    def merge(self) -> None:
        """Run every module with W + Σ weight · ΔW, summed in float64 and rounded once; the base is not written to.

        Raises
        ------
        OptionError
            If an active adapter has no ΔW, or adapters are merged already; then nothing has changed.
        """
        check_free(self.model)
        for name in self.active:
            method = METHODS[self.attachments[name].method]
            if method.space != "weight":
                where = "acts on activations" if method.space == "activation" else "has trained the base itself"
                message = (
                    f"Cannot merge the adapter '{name}': {method.title} {where} and adds nothing to a weight; "
                    "leave it out with activate(), or stay unmerged."
                )
                raise OptionError(message)
        found = [m for m in self.model.modules() if isinstance(m, Adapted) and m.active]
        runs = [merge_module(wrapper) for wrapper in found]
        for wrapper, run in zip(found, runs, strict=True):
            wrapper.run = run
        self._merged = found

    def unmerge(self) -> None:
        """Run base and updates again, as before ``merge``; nothing happens where nothing is merged."""
        for wrapper in self._merged:
            wrapper.run = None
        self._merged = []

    def detach(self, name: str) -> None:
        """Take one off; the last one gives the model its own modules back.

        Raises
        ------
        OptionError
            If the name is unknown or adapters are merged; then nothing has changed.
        """
        attachment = self._find(name)
        check_free(self.model)
        attachment.detach()
        del self.attachments[name]
        self.active.pop(name, None)

    def _enable(self, weights: Mapping[str, float]) -> None:
        """Let exactly these act, in this order."""
        for name, attachment in self.attachments.items():
            if name not in weights:
                attachment.enable(0.0)
        for name, weight in weights.items():
            self.attachments[name].enable(weight)
        self.active = {name: weight for name, weight in weights.items() if weight}

    def _find(self, name: str) -> Attachment:
        if name not in self.attachments:
            known = ", ".join(self.attachments) or "none"
            message = f"There is no adapter '{name}' on this model: it has {known}."
            raise OptionError(message)
        return self.attachments[name]


@torch.no_grad()
def merge_module(wrapper: Adapted, *, dtype: torch.dtype | None = None) -> Merged:
    """Merge the active updates of one module: W + Σ weight · ΔW in float64, rounded once.

    Parameters
    ----------
    wrapper : Adapted
        Its active updates add ΔW, or a bias, or both. Its base is only read.
    dtype : torch.dtype, optional
        Rounded to; W's own by default.

    Returns
    -------
    Merged
        With a weight as stored ((d_in, d_out) for Conv1D), none where only biases are added.
    """
    base, weight = wrapper.base, wrapper.weight
    dtype = dtype or weight.dtype
    total: Tensor | None = None
    shift: Tensor | None = None
    for slot, share in wrapper.active:
        update = wrapper.updates[slot]
        assert isinstance(update, Update)
        delta, bias = update.delta(base), find_shift(update, base)
        if delta is not None:
            dense = delta.lora_B @ delta.lora_A if isinstance(delta, LowRankDelta) else delta
            rows = share * widen(dense.T, update, base).T
            total = rows if total is None else total + rows
        if bias is not None:
            moved = share * widen(bias, update, base)
            shift = moved if shift is None else shift + moved
    if total is not None:
        total = (weight.double() + (total.T if kind_of(base) == "conv1d" else total)).to(dtype)
    return Merged(base, total, None if shift is None else shift.to(dtype))


def find_shift(update: Update, base: nn.Module) -> Tensor | None:
    """Find what an update of a weight adds to the outputs whatever the input, (d_out,) in float64; None if nothing.

    Such an update is affine: it is what zero inputs make of the base's own bias. Embeddings have none.
    """
    site = update.site
    if site.kind == "embedding":
        return None
    weight, bias = base.weight, base_bias(base, site)
    assert isinstance(weight, Tensor)
    zeros = torch.zeros(1, site.shape[-1], dtype=torch.float64, device=weight.device)
    before = zeros.new_zeros(1, site.shape[0]) if bias is None else bias.detach().double()[None]
    after: Tensor = update(zeros, before, base=base, weight=1.0)
    shift = (after - before)[0]
    return shift if shift.any() else None


def widen(part: Tensor, update: Update, base: nn.Module) -> Tensor:
    """Put what belongs to a site's outputs (…, d_part) among all outputs (…, d_out) of its module, zeros elsewhere."""
    if update.site.whole:
        return part
    return put_outputs(part.new_zeros(*part.shape[:-1], find_sides(base)[0]), part, update.site.view)


def find_sides(base: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a module's whole matrix, (V, d) of an embedding, and (d, d) of a norm."""
    weight = base.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape[0], weight.shape[-1]
    return (columns, rows) if kind_of(base) == "conv1d" else (rows, columns)
