"""How much a model's features still tell about other data: a linear probe on frozen features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaspec.errors import NumericalError
from deltaspec.training.data.examples import Examples
from deltaspec.training.measure.evaluate import evaluating

PENALTY = 1e-2  # on squared weights, beside the mean loss, of standardised features
PRECISE = 1e-6  # largest entry of the gradient, scaled, where the search ends
PATIENCE = 2000  # evaluations; 77 classes of 10,000 texts take about 120


def probe(
    model: nn.Module,
    train: Examples,
    test: Examples,
    *,
    pad: int,
    batch: int = 32,
    device: torch.device | str | None = None,
) -> float:
    """Return the accuracy on test of a linear classifier that learned from train, both as the frozen model sees them.

    Parameters
    ----------
    model : nn.Module
        Of transformers, unwrapped; it is not changed.
    train, test : Examples
        Of classification, with the same classes.
    pad, batch, device
        As features takes them.

    Raises
    ------
    NumericalError
        If features are not finite, or the classifier cannot be found.
    """
    found = [features(model, part, pad=pad, batch=batch, device=device) for part in (train, test)]
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
    """
    if not features.isfinite().all():
        message = "The model's features are NaN or infinite: its weights or activations are; lower --lr."
        raise NumericalError(message)
    values = F.pad(features.double(), (0, 1), value=1.0)
    count, classes = len(values), int(labels.max()) + 1
    ridge = torch.full((values.shape[1], 1), penalty, dtype=torch.float64)
    ridge[-1] = 0
    hessian = values.T @ values * ((classes - 1) / classes**2 / count) + torch.diag(ridge[:, 0])
    root = torch.linalg.cholesky(hessian)
    wanted = F.one_hot(labels, classes).double()
    scaled = torch.zeros(values.shape[1], classes, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [scaled],
        max_iter=PATIENCE,
        max_eval=PATIENCE,
        tolerance_grad=PRECISE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def unscale() -> Tensor:
        weights: Tensor = torch.linalg.solve_triangular(root.T, scaled.detach(), upper=True)
        return weights

    def evaluate() -> float:
        weights = unscale()
        logits = F.log_softmax(values @ weights, 1)
        slope = values.T @ (logits.exp() - wanted) / count + ridge * weights
        scaled.grad = torch.linalg.solve_triangular(root, slope, upper=False).contiguous()
        return float(-(logits * wanted).sum() / count + (ridge * weights * weights).sum() / 2)

    search.step(evaluate)  # type: ignore[no-untyped-call]
    evaluate()
    if scaled.grad is None or not float(scaled.grad.abs().max()) < 100 * PRECISE:
        message = f"The linear probe of {classes} classes did not converge in {PATIENCE} evaluations: pass more data."
        raise NumericalError(message)
    return unscale()


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and spread of each feature; a constant one has spread 1."""
    spread, mean = torch.std_mean(features.double(), 0, correction=0)
    return mean, torch.where(spread > 0, spread, 1.0)


def features(
    model: nn.Module, examples: Examples, *, pad: int, batch: int = 32, device: torch.device | str | None = None
) -> Tensor:
    """Return the mean of the last hidden state over each example's tokens, float32 (n, d) on the CPU.

    Parameters
    ----------
    model : nn.Module
        Of transformers; its body without a head is run, in eval mode.
    examples : Examples
    pad : int
        Token id to pad with.
    batch : int
        Examples at once, of similar length.
    device : torch.device or str, optional
        Where batches go; the model's own without.
    """
    place = device if device is not None else next(model.parameters()).device
    body: Any = getattr(model, "base_model", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        body = body.get_encoder()
    found: list[Tensor] = []
    order = torch.argsort(examples.lengths, stable=True)
    with evaluating(model):
        for rows in torch.split(order, batch):
            fields = {name: tensor.to(place) for name, tensor in examples.batch(rows, pad=pad).items()}
            mask = fields["attention_mask"][:, :, None]
            states = body(input_ids=fields["input_ids"], attention_mask=fields["attention_mask"])
            means = (states.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            found.append(means.cpu())
    return torch.cat(found)[torch.argsort(order)]
