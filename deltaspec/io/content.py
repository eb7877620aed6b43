"""Whether two stored tensors are one weight, and which modules of a model share one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltaspec.architecture.running_names import list_sharers
from deltaspec.io.matrix import read_tensor
from deltaspec.types import Checkpoint, TensorSpec

ROWS = 4096


def same_content(first: TensorSpec, second: TensorSpec) -> bool:
    """Tell whether two tensors hold the same values and scales; stops at the first block that differs.

    Parameters
    ----------
    first, second : TensorSpec
        Of one shape and dtype.
    """
    if (first.scale is None) != (second.scale is None):
        return False
    if first.scale and second.scale and not same_content(first.scale, second.scale):
        return False
    one, other = (_comparable(read_tensor(spec)) for spec in (first, second))
    if one.ndim == 0:
        return bool(one == other)
    return all(
        torch.equal(one[start : start + ROWS], other[start : start + ROWS]) for start in range(0, one.shape[0], ROWS)
    )


def _comparable(stored: Tensor) -> Tensor:
    """Return bytes for what is one byte wide: torch compares not all of these floats."""
    return stored.view(torch.uint8) if stored.element_size() == 1 else stored


def list_tied(base: Checkpoint, embedding: str, running: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """List the modules that use a token embedding's weight beside it, by what the checkpoint stores.

    Parameters
    ----------
    base : Checkpoint
    embedding : str
        The embedding's module path in the running model.
    running : mapping
        Running parameter name → stored name.

    Returns
    -------
    tuple of (path, kind)
        Of those that ``list_sharers`` names, the ones whose weight is the embedding's.
    """
    first = base.tensors.get(running.get(f"{embedding}.weight", ""))
    sharers = list_sharers(embedding, running, base.config)
    return tuple((path, kind) for path, kind in sharers if _is_tied(base, first, running.get(f"{path}.weight")))


def _is_tied(base: Checkpoint, first: TensorSpec | None, name: str | None) -> bool:
    """Tell whether a module's weight is the embedding's: not stored, or stored twice where the config may tie."""
    if name is None or first is None:
        return name is None
    text, second = base.config.get("text_config"), base.tensors[name]
    told = base.config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    same = first.shape == second.shape and first.dtype == second.dtype
    return told is not False and same and same_content(first, second)
