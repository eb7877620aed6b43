"""Losses, accuracies, perplexities and probes against transformers' own, direct loops and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from deltaspec.errors import NumericalError, OptionError
from deltaspec.training.data.examples import Examples, Share
from deltaspec.training.measure.evaluate import Feed, evaluate
from deltaspec.training.measure.probe import PENALTY, features, fit, probe, score
from tests import tiny_models


def make_examples(count, *, task, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 9, (count,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    ids = torch.randint(5, 25, (int(sizes.sum()),), generator=generator, dtype=torch.int32)
    labels = torch.arange(count) % 3 if task == "classification" else torch.empty(0, dtype=torch.int64)
    return Examples(task, ids, offsets, labels, ("a", "b", "c"))


def single(examples):
    """Each sequence alone, without padding."""
    return [ids.long()[None] for ids in examples.ids.split(examples.lengths.tolist())]


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_accuracy_and_loss_are_means_over_rows(batch):
    model, examples = tiny_models.build("classifier"), make_examples(11, task="classification")
    model.bert.encoder.train()
    modes = {name: module.training for name, module in model.named_modules()}
    found = evaluate(model, examples, Feed(0, batch))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        outputs = [model(ids, labels=label[None]) for ids, label in zip(single(examples), examples.labels, strict=True)]
    hits = [int(output.logits.argmax() == label) for output, label in zip(outputs, examples.labels, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(hits), abs=1e-12)
    assert 0 < found["accuracy"] < 1
    assert found["loss"] == pytest.approx(np.mean([float(output.loss) for output in outputs]), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_perplexity_is_a_mean_over_tokens(name):
    """Sequences of several lengths, where a mean over batches or rows is another number."""
    model, examples = tiny_models.build(name), make_examples(9, task="causal-lm")
    found = evaluate(model, examples, Feed(0, 4))
    with torch.no_grad():
        losses = [(float(model(ids, labels=ids).loss), ids.shape[1] - 1) for ids in single(examples)]
    wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert abs(np.mean([loss for loss, _ in losses]) - wanted) > 1e-3


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_add_up(world):
    """Each runs the model equally often, also where there are fewer batches than processes."""
    model, examples = tiny_models.build("classifier"), make_examples(10, task="classification")
    parts, calls = [], []
    model.register_forward_hook(lambda *_: calls.append(0))
    alone = evaluate(model, examples, Feed(0, 3))
    total = torch.zeros(3, dtype=torch.float64)
    for rank in range(world):
        calls.clear()
        found = evaluate(model, examples, Feed(0, 3), share=Share(rank, world), gather=total.add_)
        parts.append(len(calls))
    assert parts == [-(-4 // world)] * world
    assert found == pytest.approx(alone, rel=1e-12)


def test_what_is_not_a_number_is_said():
    model, examples = tiny_models.build("classifier"), make_examples(4, task="classification")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[examples.ids[0]] = math.nan
    with pytest.raises(NumericalError, match="loss on held-out examples is nan"):
        evaluate(model, examples, Feed(0))
    with pytest.raises(NumericalError, match="features are NaN"):
        probe(model, examples, examples, Feed(0))


def test_nothing_to_predict_is_refused():
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(OptionError, match="nothing to predict"):
        evaluate(
            tiny_models.build("llama"),
            Examples("causal-lm", empty.int(), torch.zeros(1, dtype=torch.int64), empty),
            Feed(0),
        )


def test_features_are_means_over_tokens():
    model, examples = tiny_models.build("classifier"), make_examples(7, task="classification")
    found = features(model.train(), examples, Feed(0, 3))
    assert model.training
    model.eval()
    with torch.no_grad():
        wanted = torch.cat([model.bert(ids).last_hidden_state.mean(1) for ids in single(examples)])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def objective(flat, values, labels, shape):
    """The regression's own definition, in NumPy: value and gradient."""
    weights = flat.reshape(shape)
    logits = values @ weights[:-1] + weights[-1]
    logs = scipy.special.log_softmax(logits, axis=1)
    wanted = np.eye(shape[1])[labels]
    slope = (np.exp(logs) - wanted) / len(values)
    gradient = np.vstack([values.T @ slope + PENALTY * weights[:-1], slope.sum(0)])
    return -(logs * wanted).sum() / len(values) + PENALTY / 2 * (weights[:-1] ** 2).sum(), gradient.ravel()


@pytest.mark.parametrize(("classes", "apart"), [(2, 0.0), (5, 1.0), (5, 30.0)])
def test_the_probe_is_at_the_optimum(classes, apart):
    """Features that depend on each other; classes from not at all to wholly apart."""
    random = np.random.default_rng(0)
    labels = np.arange(200) % classes
    values = (
        random.normal(size=(200, 12)) @ random.normal(size=(12, 12)) + apart * random.normal(size=(classes, 12))[labels]
    )
    values = (values - values.mean(0)) / values.std(0)
    found = fit(torch.from_numpy(values), torch.from_numpy(labels))
    assert found.dtype == torch.float64
    assert torch.equal(found, fit(torch.from_numpy(values), torch.from_numpy(labels)))
    value, gradient = objective(found.numpy().ravel(), values, labels, found.shape)
    assert np.linalg.norm(gradient) < 2e-5
    rival = scipy.optimize.minimize(
        objective, np.zeros(found.numel()), args=(values, labels, tuple(found.shape)), jac=True, tol=1e-12
    )
    assert value <= rival.fun + 1e-9


def test_the_probe_tells_classes_apart_where_features_do():
    """Against nearest centres, the best rule for two round clouds; scale and constants of features do not matter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    clouds = torch.randn(4000, 6, generator=generator) + labels[:, None] * torch.tensor([1.5, 0, 0, 0, 0, 0])
    clouds = torch.cat([clouds, torch.full((4000, 1), 7.0)], 1)
    train, test = slice(0, 2000), slice(2000, 4000)
    best = float(((clouds[test, 0] > 0.75) == (labels[test] == 1)).double().mean())
    found = score(clouds[train], labels[train], test_features=clouds[test], test_labels=labels[test])
    assert abs(found - best) < 0.015
    scaled = clouds * torch.tensor([1e4, 1, 1, 1e-4, 1, 1, 1])
    same = score(scaled[train], labels[train], test_features=scaled[test], test_labels=labels[test])
    assert abs(found - same) < 1e-3
