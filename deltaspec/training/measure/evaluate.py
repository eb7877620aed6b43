"""How good a model is on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import NumericalError, OptionError
from deltaspec.training.data.examples import ALONE, IGNORED, Examples, Share


@dataclass(frozen=True, slots=True)
class Feed:
    """How examples go through a model.

    ``pad`` is the token id to pad with, ``batch`` how many go at once, of similar length, and ``device`` where they go;
    None is the model's own.
    """

    pad: int
    batch: int = 32
    device: torch.device | str | None = None

    def split(self, examples: Examples) -> tuple[Tensor, ...]:
        """Return the rows of each batch, shortest examples first."""
        if not len(examples):
            return ()
        return torch.split(torch.argsort(examples.lengths, stable=True), self.batch)

    def lay(self, examples: Examples, rows: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """Return a batch where the model is."""
        place = self.device if self.device is not None else next(model.parameters()).device
        return {name: tensor.to(place) for name, tensor in examples.batch(rows, pad=self.pad).items()}


def evaluate(
    model: nn.Module,
    examples: Examples,
    feed: Feed,
    *,
    share: Share = ALONE,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Measure a model in eval mode: mean loss, and accuracy of classes or perplexity = exp(loss) of tokens.

    Parameters
    ----------
    model : nn.Module
        Of transformers, for the examples' task; its modes are restored.
    examples : Examples
    feed : Feed
    share : Share
        Which of the batches this process takes; all processes run the model equally often.
    gather : callable, optional
        Adds up a float64 tensor over all processes.

    Returns
    -------
    dict
        ``loss`` (nats, mean over all examples, or over all predicted tokens) and ``accuracy`` or ``perplexity``;
        sums are float64.

    Raises
    ------
    NumericalError
        If a loss is NaN or infinite.
    OptionError
        If there is nothing to predict.
    """
    sums, groups = torch.zeros(3, dtype=torch.float64), feed.split(examples)
    with evaluating(model):
        for turn in range(0, len(groups), share.world):
            mine = turn + share.rank < len(groups)
            fields = feed.lay(examples, groups[turn + share.rank if mine else turn], model)
            labels = fields.pop("labels")
            found = measure(model(**fields).logits, labels)
            sums += found if mine else 0
    return _summarise(gather(sums) if gather else sums, examples.task)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and dropout, and give every module its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum up one batch: loss, hits and how many were to predict, float64 (3,) on the CPU.

    Parameters
    ----------
    logits : Tensor, (n, classes), or (n, length, vocabulary) of a causal model
    labels : Tensor, (n,), or (n, length) with IGNORED where there is no token

    Returns
    -------
    Tensor
        Losses are computed in float32, a row at a time where there is a vocabulary, and summed in float64.

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 20.0], [20.0, 0.0], [0.0, 20.0]])
    >>> measure(logits, torch.tensor([1, 0, 0]))[1:]
    tensor([2., 3.], dtype=torch.float64)
    """
    if logits.ndim == 2:
        losses = F.cross_entropy(logits.float(), labels, reduction="none").cpu().double()
        hits = (logits.argmax(1) == labels).sum().cpu()
        return torch.stack([losses.sum(), hits.double(), torch.tensor(float(len(labels)), dtype=torch.float64)])
    total = torch.zeros(3, dtype=torch.float64)
    for row, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):
        known = wanted != IGNORED
        losses = F.cross_entropy(row[known].float(), wanted[known], reduction="none").cpu().double()
        total += torch.tensor([float(losses.sum()), 0.0, float(len(losses))], dtype=torch.float64)
    return total


def _summarise(sums: Tensor, task: str) -> dict[str, float]:
    loss, hits, count = sums.tolist()
    if not count:
        message = "There is nothing to predict in the held-out examples: pass more of them."
        raise OptionError(message)
    loss /= count
    if not math.isfinite(loss):
        message = (
            f"The loss on held-out examples is {loss}: the weights or activations are not finite; lower --lr, or train "
            "with --precision no."
        )
        raise NumericalError(message)
    if task == "causal-lm":
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}
    return {"loss": loss, "accuracy": hits / count}
