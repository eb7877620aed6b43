"""Factors in pieces, each mixed from the few best vectors of a bank; and the logits of stored shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaspec.errors import CheckpointError

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"
ROUNDING = 1e-3  # by how much stored weights of one piece may exceed 1 before the file counts as damaged


def mix_vectors(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """Mix each piece from its best vectors: Σ_k softmax(the topk largest logits)_k · bank_k.

    Parameters
    ----------
    logits : Tensor, (…, h)
        Of each piece over the bank.
    bank : Tensor, (h, b)
        Moved to the logits' device.
    topk : int, 1 ≤ topk ≤ h

    Returns
    -------
    Tensor, (…, b)

    References
    ----------
    Li, Han, Ji, VB-LoRA, NeurIPS 2024, equations 2 and 3.

    Examples
    --------
    >>> import torch
    >>> bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    >>> mix_vectors(torch.tensor([[4.0, 4.0, -1.0]]), bank, 2)
    tensor([[0.5000, 1.0000]])
    """
    best, places = logits.topk(topk, dim=-1)
    weights, bank = best.softmax(-1), bank.to(logits.device)
    pieces = weights[..., :1] * F.embedding(places[..., 0], bank)
    for number in range(1, topk):
        pieces = pieces + weights[..., number, None] * F.embedding(places[..., number], bank)
    return pieces


def restore_logits(places: Tensor, weights: Tensor, *, vectors: int, name: str) -> Tensor:
    """Return logits whose softmax gives stored weights: their logarithms, and -inf elsewhere.

    Parameters
    ----------
    places : Tensor, (…, k)
        Indices of the best vectors.
    weights : Tensor, (…, k - 1)
        Their shares but for the last, which is what is missing to 1; where rounding made that negative, it is 0.
    vectors : int
        h, how many the bank holds.
    name : str
        For the error.

    Returns
    -------
    Tensor, (…, h), float32

    Raises
    ------
    CheckpointError
        If shapes do not fit one another or the bank, or weights are no shares of 1.

    Examples
    --------
    >>> import torch
    >>> restore_logits(torch.tensor([[2, 0]]), torch.tensor([[0.25]]), vectors=3, name="A").softmax(-1)
    tensor([[0.7500, 0.0000, 0.2500]])
    """
    weights, places = weights.float(), places.long()
    fits = weights.shape == (*places.shape[:-1], places.shape[-1] - 1)
    if not fits or (places.numel() and not 0 <= int(places.min()) <= int(places.max()) < vectors):
        message = (
            f"The adapter's '{name}{INDICES}' of shape {tuple(places.shape)} does not fit its weights of shape "
            f"{tuple(weights.shape)} and a bank of {vectors} vectors: download it again."
        )
        raise CheckpointError(message)
    last = 1 - weights.sum(-1, keepdim=True)
    if not bool((weights >= 0).all() and (last >= -ROUNDING).all()):
        message = f"The adapter's '{name}{WEIGHTS}' are no shares of 1 from 0 up: download it again."
        raise CheckpointError(message)
    logits = torch.cat([weights, last.clamp(min=0)], dim=-1).log()
    return logits.new_full((*places.shape[:-1], vectors), -torch.inf).scatter(-1, places, logits)
