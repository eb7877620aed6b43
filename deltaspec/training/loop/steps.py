"""One plain loop: batches in, gradients over all of a step's examples, one update; nothing of files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import NumericalError
from deltaspec.options.training import LoopOptions
from deltaspec.training.data.examples import IGNORED
from deltaspec.training.loop.schedule import rate_at
from deltaspec.training.loop.sharded import gather
from deltaspec.training.sites.attachment import Group
from deltaspec.types.running import Accelerator


class NumberedBatches(Protocol):
    """Batches by number, counted through all epochs; see data.Batches."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def batch_at(self, number: int) -> dict[str, Tensor]:
        """Return one batch: input_ids, attention_mask, labels."""


@dataclass(frozen=True, slots=True)
class Tick:
    """One step: its number from 1, of how many, passes over the data so far, and what metrics.jsonl keeps of it."""

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    seconds: float

    def to_dict(self) -> dict[str, float]:
        """Return a line of metrics."""
        fields = asdict(self)
        del fields["total"]
        return fields


def count_steps(batches: NumberedBatches, options: LoopOptions) -> int:
    """Return the steps of a training; the last one of its epochs may have fewer batches."""
    return options.steps or -(-options.epochs * len(batches) // options.accumulate)


def make_optimizer(groups: Sequence[Group], options: LoopOptions) -> torch.optim.AdamW:
    """Make AdamW over the groups; biases, norms and other vectors do not decay.

    Parameters
    ----------
    groups : sequence of Group
    options : LoopOptions

    Returns
    -------
    torch.optim.AdamW
        Its param_groups hold "factor", what the step's rate is multiplied by.
    """
    sorted_out: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group.parameters:
            sorted_out.setdefault((group.factor, group.decay and parameter.ndim > 1), []).append(parameter)
    settings = [
        {"params": parameters, "factor": factor, "weight_decay": options.weight_decay if decay else 0.0}
        for (factor, decay), parameters in sorted_out.items()
    ]
    return torch.optim.AdamW(settings, lr=options.lr)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model and its optimiser, as ``accelerator.prepare`` returned them, and the accelerator."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator


def run_loop(
    prepared: Prepared, batches: NumberedBatches, options: LoopOptions, *, start: int, after: Callable[[Tick], None]
) -> None:
    """Train from a step to the end.

    Parameters
    ----------
    prepared : Prepared
    batches : NumberedBatches
    options : LoopOptions
    start : int
        Steps that are done already.
    after : callable
        Called with a Tick after each step, when weights and optimiser are those that the next step begins with; it may
        evaluate and save.

    Raises
    ------
    NumericalError
        If a loss or gradient is no number, before it reaches the weights.

    Notes
    -----
    A step's loss is the mean over all its examples (tokens, for a language model) in all batches and processes, so
    that neither accumulation nor the number of processes changes it.
    """
    total = count_steps(batches, options)
    end = options.epochs * len(batches) if not options.steps else total * options.accumulate
    for step in range(start, total):
        began, rate = time.perf_counter(), rate_at(step, total, options)
        numbers = range(step * options.accumulate, min((step + 1) * options.accumulate, end))
        _set_rate(prepared, rate)
        loss = _gather_gradients(prepared, [batches.batch_at(number) for number in numbers])
        norm = _clip(prepared, options)
        _check_finite(loss, norm, step + 1, options, scaled=prepared.accelerator.scaler is not None)
        prepared.optimizer.step()
        prepared.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        after(Tick(step + 1, total, (numbers[-1] + 1) / len(batches), loss, rate, norm, seconds))


def _set_rate(prepared: Prepared, rate: float) -> None:
    """Make ready for a step: training mode, and each group's learning rate."""
    prepared.model.train()
    for group in prepared.optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def _clip(prepared: Prepared, options: LoopOptions) -> float:
    """Clip gradients, and return their norm before."""
    parameters = [parameter for group in prepared.optimizer.param_groups for parameter in group["params"]]
    return float(gather(prepared.accelerator.clip_grad_norm_(parameters, options.clip or math.inf)))


def sum_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropies in nats: of classes (n, c) against (n,), or of next tokens (n, t, v) against (n, t).

    Parameters
    ----------
    logits : Tensor
        Computed with in float32.
    labels : Tensor, int64
        IGNORED where there is nothing to predict.

    Examples
    --------
    >>> sum_losses(torch.zeros(2, 4), torch.tensor([0, 3]))  # 2 · ln 4
    tensor(2.7726)
    """
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def _gather_gradients(prepared: Prepared, parts: list[dict[str, Tensor]]) -> float:
    """Run a step's batches forth and back; returns the mean loss over all processes."""
    model, accelerator = prepared.model, prepared.accelerator
    counts = sum(int(((p["labels"] if p["labels"].ndim == 1 else p["labels"][:, 1:]) != IGNORED).sum()) for p in parts)
    count = float(accelerator.reduce(torch.tensor(float(counts), device=accelerator.device), reduction="sum"))
    summed = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts, 1):
        inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in part.items()}
        labels = inputs.pop("labels")
        with accelerator.no_sync(model) if number < len(parts) else nullcontext():
            losses = sum_losses(model(**inputs).logits, labels)
            # Processes' gradients are averaged, and here they are to be added.
            accelerator.backward(losses * (accelerator.num_processes / max(count, 1.0)))
        summed += losses.detach()
    return float(accelerator.reduce(summed, reduction="sum")) / max(count, 1.0)


def _check_finite(loss: float, norm: float, step: int, options: LoopOptions, *, scaled: bool) -> None:
    if math.isfinite(loss) and (math.isfinite(norm) or scaled):  # a loss scaler skips such a step, and scales down
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of its gradients is {norm}"
    message = (
        f"Training stopped at step {step}: its {what}, and the weights are still those before it; "
        f"try a lower --lr (it is {options.lr:g}), a longer --warmup, a smaller --clip, or --precision bf16 for fp16."
    )
    raise NumericalError(message)
