"""A batch whose rows use different adapters in one forward: their factors stacked, and gathered by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import OptionError
from deltaspec.training.methods import METHODS
from deltaspec.training.several.switching import find_shift, find_sides, widen
from deltaspec.training.sites.adapted import Adapted, check_free
from deltaspec.training.sites.attachment import Attachment


class Stack(nn.Module):
    """What several adapters add at one module, stacked, and which of them each row of a batch uses.

    ``lora_A`` is (K + 1, r, d_in), ``lora_B`` (K + 1, d_out, r) and ``shift`` (K + 1, d_out) or None; smaller ranks
    are filled up with zeros, and the last entry is all zeros, for rows without an adapter. ``index`` is (batch,), or
    (1,) for all rows of any batch where ``alike``; it is written to in place, so that nothing is compiled again.
    """

    base: nn.Module
    lora_A: Tensor
    lora_B: Tensor
    shift: Tensor | None
    index: Tensor

    def __init__(self, base: nn.Module, path: str, added: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)  # its wrapper's, not a second time this one's
        self.path, self.embeds, self.alike = path, isinstance(base, nn.Embedding), True
        rank = max(len(lora_A) for lora_A, _, _ in added)
        lora_A = _stack([F.pad(a, (0, 0, 0, rank - len(a))) for a, _, _ in added])
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer(
            "lora_B", _stack([F.pad(b, (0, rank - b.shape[1])) for _, b, _ in added]), persistent=False
        )
        shift = _stack([moved for _, _, moved in added])
        self.register_buffer("shift", shift if shift.any() else None, persistent=False)
        self.register_buffer("index", torch.tensor([len(added)], device=lora_A.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + x Aᵀ Bᵀ + shift with those of each row."""
        y: Tensor = self.base(x)
        if not self.alike and len(self.index) != len(x):
            message = (
                f"The selection has {len(self.index)} rows, but '{self.path}' got a batch of {len(x)}: "
                "call select() with an adapter or None for each row, or with a single one for all."
            )
            raise OptionError(message)
        rows = len(self.index)
        if self.shift is not None:
            shift = self.shift.index_select(0, self.index)
            y = (y + shift.view(rows, *[1] * (y.ndim - 2), -1)).to(y.dtype)
        if not self.lora_A.shape[1]:
            return y
        lora_A = self.lora_A.index_select(0, self.index)
        if self.embeds:
            tokens = x.reshape(rows, -1) + self.index[:, None] * self.lora_B.shape[1]
            h, out = F.embedding(tokens, self.lora_B.flatten(0, 1)), lora_A
            h = h * getattr(self.base, "embed_scale", 1.0)
        else:
            h = torch.bmm(x.reshape(rows, -1, x.shape[-1]).to(lora_A.dtype), lora_A.mT)
            out = self.lora_B.index_select(0, self.index).mT
        if y.dtype == h.dtype == out.dtype and y.is_contiguous() and not y.requires_grad:
            y.view(rows, -1, y.shape[-1]).baddbmm_(h, out)
            return y
        return (y + torch.bmm(h, out).view(y.shape)).to(y.dtype)


class MixedBatch:
    """Lets each row of a batch use an adapter of its own in inference, until ``close()``; at first none does.

    Parameters
    ----------
    model : nn.Module
        All its adapters stand back meanwhile, also those that are not among ``attachments``.
    attachments : sequence of Attachment, or mapping to them
        On this model, of methods that change weights by factors; copied as they are now, at weight 1.

    Raises
    ------
    OptionError
        If one of them is not of such a method, or the model's adapters are merged or mixed already.

    Notes
    -----
    Every module that they change must see the batch on its input's first axis.
    """

    def __init__(self, model: nn.Module, attachments: Sequence[Attachment] | Mapping[str, Attachment]) -> None:
        check_free(model)
        attachments = list(attachments.values() if isinstance(attachments, Mapping) else attachments)
        for attachment in attachments:
            if METHODS[attachment.method].space != "weight":
                raise _refusal(attachment, "it does not change weights by factors")
        self.numbers = {attachment.name: number for number, attachment in enumerate(attachments)}
        wrappers = {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}
        with torch.no_grad():
            added = {p: [collect_added(a, p, wrapper) for a in attachments] for p, wrapper in wrappers.items()}
            self.stacks = {path: Stack(wrapper.base, path, added[path]) for path, wrapper in wrappers.items()}
        self.wrappers = list(wrappers.values())
        for path, wrapper in wrappers.items():
            wrapper.run = self.stacks[path]

    def select(self, rows: Sequence[str | None] | str | None) -> None:
        """Choose the adapter of each row by name, or one for all rows of any batch; None is the base alone.

        Raises
        ------
        OptionError
            If a name is unknown; then nothing has changed.
        """
        alike = rows is None or isinstance(rows, str)
        names = [rows] if rows is None or isinstance(rows, str) else list(rows)
        for name in names:
            if name is not None and name not in self.numbers:
                message = f"Cannot select the adapter '{name}': this mix has {', '.join(self.numbers)}."
                raise OptionError(message)
        index = torch.tensor([len(self.numbers) if name is None else self.numbers[name] for name in names])
        for stack in self.stacks.values():
            stack.alike = alike
            if len(stack.index) == len(index):
                stack.index.copy_(index)
            else:
                stack.index = index.to(stack.index.device)

    def close(self) -> None:
        """Give the model back to its adapters, as they were."""
        for wrapper in self.wrappers:
            wrapper.run = None
        self.wrappers, self.stacks = [], {}


def collect_added(attachment: Attachment, path: str, wrapper: Adapted) -> tuple[Tensor, Tensor, Tensor]:
    """Collect what one adapter adds at one module: factors over all its parts, and what moves its outputs.

    Parameters
    ----------
    attachment : Attachment
    path : str
        The module's.
    wrapper : Adapted
        At that path.

    Returns
    -------
    lora_A, (r, d_in), lora_B, (d_out, r), and shift, (d_out,)
        With r = 0 and zeros where it adds nothing. Rows of parts of a fused module lie among all of its outputs.

    Raises
    ------
    OptionError
        If it changes the weight in another way (DoRA).
    """
    base = wrapper.base
    weight = base.weight
    assert isinstance(weight, Tensor)
    d_out, d_in = find_sides(base)
    factors = [(weight.new_zeros(0, d_in, dtype=torch.float32), weight.new_zeros(d_out, 0, dtype=torch.float32))]
    shift = weight.new_zeros(d_out, dtype=torch.float64)
    for update in (update for update in attachment.updates.values() if update.site.path == path):
        pair, moved = update.factors(), find_shift(update, base)
        if pair is None and update.delta(base) is not None:
            raise _refusal(attachment, f"at '{update.site.name}' its change of the weight has no factors")
        if pair is not None:
            factors.append((pair[0], widen(pair[1].T, update, base).T))
        if moved is not None:
            shift += widen(moved, update, base)
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1), shift.float()


def _refusal(attachment: Attachment, reason: str) -> OptionError:
    message = (
        f"Cannot mix the adapter '{attachment.name}' by row ({METHODS[attachment.method].title}): {reason}; "
        "leave it out, or run its rows in a batch of their own."
    )
    return OptionError(message)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack equal shapes, and zeros as one more."""
    return torch.stack([*tensors, torch.zeros_like(tensors[0])])
