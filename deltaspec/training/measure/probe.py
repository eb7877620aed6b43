"""How much a model's features still tell about other data: a linear probe on frozen features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import NumericalError
from deltaspec.training.data.examples import Examples
from deltaspec.training.measure.evaluate import Feed, evaluating

PENALTY = 1e-2  # on squared weights, beside the mean loss, of standardised features
PRECISE = 1e-6  # largest entry of the gradient, scaled, where the search ends
PATIENCE = 2000  # evaluations; 77 classes of 10,000 texts take about 120


def probe(model: nn.Module, train: Examples, test: Examples, feed: Feed) -> float:
    """Return the accuracy on test of a linear classifier that learned from train, both as the frozen model sees them.

    Parameters
    ----------
    model : nn.Module
        Of transformers, unwrapped; it is not changed.
    train, test : Examples
        Of classification, with the same classes.
    feed : Feed

    Raises
    ------
    NumericalError
        If features are not finite, or the classifier cannot be found.
    """
    found = [features(model, part, feed) for part in (train, test)]
    return score(found[0], train.labels, test_features=found[1], test_labels=test.labels)


def score(features: Tensor, labels: Tensor, *, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the accuracy of a linear classifier on other features; arguments as of fit, errors too."""
    mean, spread = _standard(features)
    weights = fit((features.double() - mean) / spread, labels)
    tested = (test_features.double() - mean) / spread
    guessed = (tested @ weights[:-1] + weights[-1]).argmax(1)
    return float((guessed == test_labels).double().mean())


def fit(features: Tensor, labels: Tensor, *, penalty: float = PENALTY) -> Tensor:
    """Solve multinomial logistic regression: min over W, b of mean(-log softmax(X W + b)[y]) + penalty/2 ‖W‖².

    Parameters
    ----------
    features : Tensor, (n, d)
        X, standardised.
    labels : Tensor, (n,), int64
        y, from 0 to classes - 1.
    penalty : float, > 0

    Returns
    -------
    Tensor
        W and below it b, (d + 1, classes), float64.

    Raises
    ------
    NumericalError
        If features are not finite, or the search does not end.

    Notes
    -----
    L-BFGS in coordinates in which the Hessian at W = 0 is one, which takes an eighth of the evaluations on two classes
    and half of them on 77. The objective is strictly convex in W: there is one solution.

    Examples
    --------
    >>> weights = fit(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    >>> (torch.tensor([[-3.0], [2.0]]).double() @ weights[:-1] + weights[-1]).argmax(1)
    tensor([0, 1])
    """
    if not features.isfinite().all():
        message = "The model's features are NaN or infinite: its weights or activations are; lower --lr."
        raise NumericalError(message)
    return _Problem(features, labels, penalty).solve()


class _Problem:
    """The objective of ``fit``, in coordinates in which its Hessian at W = 0 is one.

    Parameters
    ----------
    features : Tensor, (n, d)
    labels : Tensor, (n,), int64
    penalty : float
    """

    def __init__(self, features: Tensor, labels: Tensor, penalty: float) -> None:
        self.values = F.pad(features.double(), (0, 1), value=1.0)
        count, classes = len(self.values), int(labels.max()) + 1
        self.ridge = torch.full((self.values.shape[1], 1), penalty, dtype=torch.float64)
        self.ridge[-1] = 0
        gram = self.values.T @ self.values
        self.root = torch.linalg.cholesky(gram * ((classes - 1) / classes**2 / count) + torch.diag(self.ridge[:, 0]))
        self.wanted = F.one_hot(labels, classes).double()

    def solve(self) -> Tensor:
        """Return the weights at the minimum; NumericalError where the search does not end there."""
        shape = (self.values.shape[1], self.wanted.shape[1])
        scaled = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [scaled],
            max_iter=PATIENCE,
            max_eval=PATIENCE,
            tolerance_grad=PRECISE,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def evaluate() -> float:
            loss, scaled.grad = self.evaluate(scaled.detach())
            return loss

        search.step(evaluate)  # type: ignore[no-untyped-call]
        evaluate()
        if scaled.grad is None or not float(scaled.grad.abs().max()) < 100 * PRECISE:
            message = (
                f"The linear probe of {shape[1]} classes did not converge in {PATIENCE} evaluations: pass more data."
            )
            raise NumericalError(message)
        return self.unscale(scaled.detach())

    def unscale(self, scaled: Tensor) -> Tensor:
        """Return W and below it b, (d + 1, classes)."""
        weights: Tensor = torch.linalg.solve_triangular(self.root.T, scaled, upper=True)
        return weights

    def evaluate(self, scaled: Tensor) -> tuple[float, Tensor]:
        """Return the objective and its gradient (d + 1, classes)."""
        weights, count = self.unscale(scaled), len(self.values)
        logits = F.log_softmax(self.values @ weights, 1)
        slope = self.values.T @ (logits.exp() - self.wanted) / count + self.ridge * weights
        gradient = torch.linalg.solve_triangular(self.root, slope, upper=False).contiguous()
        return float(-(logits * self.wanted).sum() / count + (self.ridge * weights * weights).sum() / 2), gradient


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and spread of each feature; a constant one has spread 1."""
    spread, mean = torch.std_mean(features.double(), 0, correction=0)
    return mean, torch.where(spread > 0, spread, 1.0)


def features(model: nn.Module, examples: Examples, feed: Feed) -> Tensor:
    """Return the mean of the last hidden state over each example's tokens, float32 (n, d) on the CPU.

    Parameters
    ----------
    model : nn.Module
        Of transformers; its body without a head is run, in eval mode.
    examples : Examples
    feed : Feed
    """
    body: Any = getattr(model, "base_model", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        body = body.get_encoder()
    found: list[Tensor] = []
    groups = feed.split(examples)
    with evaluating(model):
        for rows in groups:
            fields = feed.lay(examples, rows, model)
            mask = fields["attention_mask"][:, :, None]
            states = body(input_ids=fields["input_ids"], attention_mask=fields["attention_mask"])
            means = (states.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            found.append(means.cpu())
    return torch.cat(found)[torch.argsort(torch.cat(groups))]
