"""How alike the outputs of two models are: divergence of distributions, agreement of the first choice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltaspec.errors import PairingError, RunError

CHUNK = 1 << 23  # numbers compared at once: 64 MB in float64
TEMPERATURE = 0.05


@dataclass(frozen=True, slots=True)
class Score:
    """One model against the fine-tune; see Divergence."""

    kl: float
    top1: float
    cases: int
    hidden: float | None = None


class Reference:
    """The fine-tune's outputs, on disk, and what others are away from them."""

    def __init__(self, folder: Path, *, headless: bool) -> None:
        self._folder, self._headless = folder, headless

    def store(self, outputs: Iterator[Tensor]) -> None:
        """Keep the fine-tune's outputs."""
        try:
            for number, values in enumerate(outputs):
                np.save(self._folder / f"{number}.npy", values.float().cpu().numpy())
        except OSError as cause:
            message = (
                f"The fine-tune's outputs cannot be kept in '{self._folder}' ({cause.strerror}): pass fewer --tokens, "
                "or set TMPDIR to a folder with room."
            )
            raise RunError(message) from cause

    def compare(self, outputs: Iterator[Tensor], *, device: torch.device) -> Score:
        """Compare another model's outputs on the same batches."""
        pairs = (
            (torch.from_numpy(np.load(self._folder / f"{number}.npy", mmap_mode="c")), values)
            for number, values in enumerate(outputs)
        )
        return compare_hidden(pairs) if self._headless else compare_logits(pairs, device=device)


def compare_logits(pairs: Iterator[tuple[Tensor, Tensor]], *, device: torch.device) -> Score:
    """Score logits (cases, outcomes) of the fine-tune and of another model, in pairs.

    Raises
    ------
    PairingError
        If there is but one outcome.
    """
    energy, same, cases = 0.0, 0, 0
    for mine, other in pairs:
        outcomes = min(mine.shape[1], other.shape[1])
        if outcomes < 2:
            message = "The models have one output and so no distribution: divergence is not defined for regression."
            raise PairingError(message)
        step = max(1, CHUNK // outcomes)
        for start in range(0, len(mine), step):
            rows = [x[start : start + step, :outcomes].to(device, torch.float64) for x in (mine, other)]
            kl, agree = score_rows(*rows)
            energy, same, cases = energy + float(kl.sum()), same + int(agree.sum()), cases + len(kl)
    return Score(energy / cases, same / cases, cases)


def compare_hidden(pairs: Iterator[tuple[Tensor, Tensor]]) -> Score:
    """Score hidden states (texts, tokens, d) of the fine-tune and of another model, in pairs.

    Raises
    ------
    PairingError
        If the states have other sizes, or there are fewer than three texts.
    """
    error = size = 0.0
    means: tuple[list[Tensor], list[Tensor]] = ([], [])
    for mine, other in pairs:
        states = [x.to("cpu", torch.float64) for x in (mine, other)]
        if mine.shape != other.shape:
            message = f"Hidden states of the base and the fine-tune differ in size: {other.shape[2]}, {mine.shape[2]}."
            raise PairingError(message)
        error += float((states[1] - states[0]).square().sum())
        size += float(states[0].square().sum())
        for kept, state in zip(means, states, strict=True):
            kept.append(torch.nn.functional.normalize(state.mean(dim=1), dim=1))
    mine, other = (torch.cat(kept) for kept in means)
    if len(mine) < 3:
        message = f"The text has {len(mine)} different sequences, and nearest ones are compared: pass three or more."
        raise PairingError(message)
    energy, same, step = 0.0, 0, max(1, CHUNK // len(mine))
    for start in range(0, len(mine), step):
        rows = []
        for all_ in (mine, other):
            near = all_[start : start + step] @ all_.mT / TEMPERATURE
            near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -torch.inf  # not itself
            rows.append(near)
        kl, agree = score_rows(*rows)
        energy, same = energy + float(kl.sum()), same + int(agree.sum())
    return Score(energy / len(mine), same / len(mine), len(mine), math.sqrt(error / size))


def score_rows(mine: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(softmax(mine) ‖ softmax(other)) of each row, in nats, and whether both have the same largest entry.

    Parameters
    ----------
    mine, other : Tensor, (cases, outcomes), float64
        -inf where an outcome is ruled out.

    Returns
    -------
    divergence : Tensor, (cases,), float64
    agree : Tensor, (cases,), bool

    Examples
    --------
    >>> rows = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    >>> [found.tolist() for found in score_rows(*(row.double() for row in rows))]
    [[0.0, 0.6931471805599453], [True, True]]
    """
    p, q = mine.log_softmax(dim=1), other.log_softmax(dim=1)
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
    return terms.sum(dim=1), mine.argmax(dim=1) == other.argmax(dim=1)
