"""The loop against plain PyTorch with the losses of transformers; schedules against numbers worked out by hand."""

from __future__ import annotations

import math

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

from deltaspec.errors import NumericalError, OptionError
from deltaspec.options import LoopOptions
from deltaspec.training.loop.schedule import rate_at
from deltaspec.training.loop.steps import Prepared, count_steps, make_optimizer, run_loop
from deltaspec.training.sites.attachment import Group
from tests.tiny_models import VOCAB, build


class Given:
    """Ragged batches that are written down."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def batch_at(self, number):
        return self.batches[number % len(self)]


def make_rows(count, *, causal, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(5, len(VOCAB), (4 + 3 * (number % 3),), generator=generator)
        rows.append((ids, ids.clone() if causal else torch.tensor(number % 2)))
    return rows


def lay(rows):
    """Pad rows to one batch."""
    width = max(len(ids) for ids, _ in rows)
    batch = {"input_ids": torch.zeros(len(rows), width, dtype=torch.int64)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    causal = rows[0][1].ndim == 1
    batch["labels"] = torch.full_like(batch["input_ids"], -100) if causal else torch.stack([label for _, label in rows])
    for number, (ids, label) in enumerate(rows):
        batch["input_ids"][number, : len(ids)] = ids
        batch["attention_mask"][number, : len(ids)] = 1
        if causal:
            batch["labels"][number, : len(ids)] = label
    return batch


def make_model(causal):
    if causal:
        return build("llama")
    return build("classifier", num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def run(model, batches, options, *, groups=None, accelerator=None):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    groups = groups or [Group(tuple(model.parameters()))]
    model, optimizer = accelerator.prepare(model, make_optimizer(groups, options))
    ticks = []
    run_loop(Prepared(model, optimizer, accelerator), Given(batches), options, start=0, after=ticks.append)
    return ticks


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_adamw_on_the_loss_of_transformers(causal):
    """Every step's loss, gradient norm and rate, and the weights at the end."""
    options = LoopOptions(lr=3e-3, steps=5, warmup=2, schedule="cosine", weight_decay=0.1, clip=0.5)
    batches = [lay(make_rows(4, causal=causal, seed=seed)) for seed in range(3)]
    oracle, ours = make_model(causal).train(), make_model(causal)
    decayed = [p for p in oracle.parameters() if p.ndim > 1]
    plain = [p for p in oracle.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    rates = [1.5e-3, 3e-3, 3e-3, 3e-3 * 0.75, 3e-3 * 0.25]  # cosines of 0°, 60° and 120°
    expected = []
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        loss = oracle(**batches[step % 3]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        expected.append((loss.item(), norm.item(), rate))
    ticks = run(ours, batches, options)
    found = [(tick.loss, tick.grad_norm, tick.lr) for tick in ticks]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4)
    for (name, mine), theirs in zip(ours.named_parameters(), oracle.parameters(), strict=True):
        # A softmax does not feel the keys' bias: its gradient is rounding noise, which AdamW brings to full size.
        assert "key.bias" in name or torch.allclose(mine, theirs, atol=2e-6), name
    assert [tick.epoch for tick in ticks] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])


@pytest.mark.parametrize("causal", [False, True])
def test_a_step_is_a_mean_over_all_that_it_accumulates(causal):
    """Batches of other sizes and lengths weigh what they hold: as if all were one."""
    rows = make_rows(7, causal=causal)
    whole, parts = make_model(causal), make_model(causal)
    one = run(whole, [lay(rows)], LoopOptions(lr=1e-2, steps=1, warmup=0))
    two = run(parts, [lay(rows[:5]), lay(rows[5:])], LoopOptions(lr=1e-2, steps=1, accumulate=2, warmup=0))
    assert two[0].loss == pytest.approx(one[0].loss, rel=1e-6)
    assert two[0].grad_norm == pytest.approx(one[0].grad_norm, rel=1e-4)
    uneven = sum(make_model(causal)(**lay(part)).loss.item() for part in (rows[:5], rows[5:])) / 2
    assert abs(uneven - one[0].loss) > 1e-4  # a mean of means is something else


def test_groups_have_their_own_rates_and_decay():
    matrix, vector, frozen_rate = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 2), (2,), (2, 2)))
    options = LoopOptions(lr=0.1, weight_decay=0.5)
    groups = [Group((matrix, vector)), Group((frozen_rate,), factor=4.0, decay=False)]
    found = {
        id(p): (group["factor"], group["weight_decay"])
        for group in make_optimizer(groups, options).param_groups
        for p in group["params"]
    }
    assert found == {id(matrix): (1.0, 0.5), id(vector): (1.0, 0.0), id(frozen_rate): (4.0, 0.0)}


def test_what_is_no_number_never_reaches_the_weights():
    model = make_model(causal=False)
    with torch.no_grad():
        model.classifier.bias[0] = math.inf
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NumericalError, match=r"step 1: its loss is nan.*lower --lr \(it is 0.01\)"):
        run(model, [lay(make_rows(4, causal=False))], LoopOptions(lr=1e-2, steps=2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
@pytest.mark.parametrize("warmup", [0.5, 4])
def test_schedules(schedule, expected, warmup):
    options = LoopOptions(lr=2.0, schedule=schedule, warmup=warmup)
    assert [rate_at(step, 8, options) for step in range(8)] == pytest.approx([2 * share for share in expected])


def test_steps_of_epochs():
    """Seven batches, twice, by four: three whole steps and one of two batches."""
    assert count_steps(Given([{}] * 7), LoopOptions(epochs=2, accumulate=4)) == 4
    assert count_steps(Given([{}] * 7), LoopOptions(epochs=2, accumulate=4, steps=9)) == 9
    rows = [lay(make_rows(1, causal=False, seed=seed)) for seed in range(3)]
    ticks = run(make_model(causal=False), rows, LoopOptions(lr=1e-3, epochs=1, accumulate=2))
    assert [tick.epoch for tick in ticks] == pytest.approx([2 / 3, 1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": math.nan}, "--lr is nan"),
        ({"schedule": "step"}, "--schedule is 'step'"),
        ({"accumulate": 0}, "--accumulate is 0"),
        ({"weight_decay": -1.0}, "--weight-decay is -1.0"),
        ({"clip": math.inf}, "--clip is inf"),
    ],
)
def test_wrong_options_are_named(wrong, said):
    with pytest.raises(OptionError, match=said):
        LoopOptions(**wrong)
