"""ΔW of a fine-tune, matrix by matrix, however it is stored: two checkpoints, LoRA's factors, or any other adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltaspec.delta import DenseDelta, stream
from deltaspec.errors import MismatchError, PairingError
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import open_source
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.plan import chosen
from deltaspec.training.sites.attachment import Attachment
from deltaspec.types import ForeignAdapter, LowRankDelta, MatrixKey, MatrixSource, WeightPair
from deltaspec.workflows.analysis.analyze import pair_sources
from deltaspec.workflows.analysis.attached_adapter import attach_adapter
from deltaspec.workflows.analysis.attached_matrix import LiveTask, base_weight, delta_of, list_pieces
from deltaspec.workflows.shared.opened_base import Base


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix: ``weight()`` and ``delta()`` form W and ΔW, (d_out, d_in) float64 on a device, at every call."""

    key: MatrixKey
    shape: tuple[int, int]
    weight: Callable[[], Tensor]
    delta: Callable[[], Tensor]


def open_changes(
    base: Base, ref: str | Path, options: AnalyzeOptions, *, device: torch.device, keep: ExitStack
) -> dict[str, Change]:
    """Open what a fine-tune changes, by key; nothing is read yet.

    Parameters
    ----------
    base : Base
    ref : str or Path
        A checkpoint, or an adapter of any method that changes weights.
    options : AnalyzeOptions
        ``include`` and ``exclude``.
    device : torch.device
    keep : ExitStack
        Closing it takes adapters that had to be attached to the running base off again.
    """
    tuned = open_source(ref)
    if isinstance(tuned, ForeignAdapter):
        name = hashlib.sha256(str(tuned.root).encode()).hexdigest()[:16]  # unlike any other on the same base
        attached = attach_adapter(base, tuned, name=name)
        keep.callback(attached.attachment.detach)
        tasks = [
            LiveTask(site, piece, key, "delta")
            for site, piece, key in list_pieces(attached.attachment, attached.names)
            if chosen(key.tensor, options)
        ]
        return {str(task.key): _live(attached.attachment, task, device) for task in tasks}
    try:
        plan = pair_sources(base.source, tuned, options)
    except MismatchError as error:
        raise PairingError(error.advise(exclude=True)) from error  # what compare has
    return {str(pair.key): _stored(pair, device) for pair in plan.pairs}


def _stored(pair: WeightPair, device: torch.device) -> Change:
    def delta() -> Tensor:
        if not isinstance(pair.tuned, MatrixSource):
            factors = read_low_rank(pair.tuned)
            return factors.lora_B.to(device) @ factors.lora_A.to(device)
        assert isinstance(pair.base, MatrixSource)
        return _whole(DenseDelta(pair.base, pair.tuned, device=device).blocks(), pair.shape)

    def weight() -> Tensor:
        assert isinstance(pair.base, MatrixSource)
        return _whole(stream(pair.base, device=device), pair.shape)

    return Change(pair.key, pair.shape, weight, delta)


def _live(attachment: Attachment, task: LiveTask, device: torch.device) -> Change:
    @torch.no_grad()
    def delta() -> Tensor:
        found = delta_of(attachment, task)
        dense = found.lora_B @ found.lora_A if isinstance(found, LowRankDelta) else found
        return dense.to(device)

    def weight() -> Tensor:
        return base_weight(attachment, task.piece).detach().to(device, torch.float64)

    return Change(task.key, task.shape, weight, delta)


def _whole(blocks: Iterable[Tensor], shape: tuple[int, int]) -> Tensor:
    """Join blocks along the longer axis; each is overwritten by the next."""
    return torch.cat([block.clone() for block in blocks], dim=0 if shape[0] >= shape[1] else 1)
