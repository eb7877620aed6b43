"""Methods that train the base's own parameters: which ones, what changed, and how the base gets them back."""

import weakref

import numpy as np
import pytest
import torch
import transformers

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.attachment import freeze
from deltaspec.training.sites.targets import choose_sites
from tests.tiny_models import build

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 5, 21, 3]])
BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def attach(model, method, **options):
    freeze(model)
    return METHODS[method].attach(model, [], METHODS[method].options(**options), name="default", seed=0)


def train(model, attachment, steps=2):
    optimizer = torch.optim.AdamW(attachment.trained().values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS)[0].square().mean().backward()
        optimizer.step()


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("architecture", "config", "method", "options", "count"),
    [
        ("DistilBertForSequenceClassification", {"num_labels": 2}, "full", {}, 66_955_010),
        ("DistilBertForSequenceClassification", {"num_labels": 2}, "last_layers", {"blocks": 0}, 592_130),
        ("GPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "last_layers", {}, 25_192_448),
        ("BertModel", {}, "bitfit", {}, 102_912),
        ("BertModel", BERT_LARGE, "bitfit", {}, 272_384),
    ],
)
def test_published_counts(architecture, config, method, options, count):
    cls = getattr(transformers, architecture)
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    model.tie_weights()
    attachment = attach(model, method, **options)
    assert sum(parameter.numel() for parameter in attachment.trained().values()) == count
    assert sum(attachment.count_by_role().values()) == count == attachment.stored()


@pytest.mark.parametrize("name", ["gpt2", "llama", "classifier"])
def test_full_changes_everything_and_delta_is_what_changed(name):
    model = build(name)
    before = values(model)
    attachment = attach(model, "full")
    train(model, attachment)
    after = values(model)
    assert changed(before, after) == set(before)
    tied = {"lm_head.weight"} if name == "gpt2" else set()
    assert set(attachment.state()) == set(before) - tied
    d = 16
    fused = {"q_proj": slice(0, d), "k_proj": slice(d, 2 * d), "v_proj": slice(2 * d, 3 * d)}
    seen = []
    for site in attachment.sites:
        dense = after[f"{site.path}.weight"].numpy().astype(np.float64) - before[f"{site.path}.weight"].numpy()
        if site.kind == "conv1d":
            dense = dense.T
        if not site.whole:
            dense = dense[fused[site.key.part]]
        assert np.array_equal(attachment.delta(site).numpy(), dense)
        seen.append(dense.size)
    assert sum(seen) == sum(value.numel() for key, value in before.items() if value.ndim == 2 and key not in tied)


def test_delta_subtracts_in_float64():
    model = build("llama").bfloat16()
    attachment = attach(model, "full")
    site = next(site for site in attachment.sites if site.key.role == "q_proj")
    weight = model.get_submodule(site.path).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(0.3)
    delta = attachment.delta(site)
    assert delta.dtype == torch.float64
    assert torch.equal(delta, weight.detach().double() - before.double())
    assert not torch.equal(delta, (weight.detach() - before).double())  # what bfloat16 would have made of it


@pytest.mark.parametrize("method", ["full", "last_layers", "bitfit"])
def test_switching_off_and_detaching_give_the_base_back_bit_for_bit(method):
    model = build("classifier")
    before, base = values(model), model(input_ids=IDS).logits
    attachment = attach(model, method)
    assert torch.equal(model(input_ids=IDS).logits, base)
    train(model, attachment)
    after, tuned = values(model), model(input_ids=IDS).logits
    assert not torch.equal(tuned, base)
    attachment.enable(0)
    assert changed(before, values(model)) == set()
    stored = {name: tensor.detach() for name, tensor in attachment.state().items()}
    assert all(torch.equal(stored[name], after[name]) for name in stored)
    attachment.enable(0.25)
    part = values(model)
    for name in stored:
        torch.testing.assert_close(part[name], before[name] + 0.25 * (after[name] - before[name]))
    attachment.enable(1)
    assert changed(after, values(model)) == set()
    attachment.detach()
    assert changed(before, values(model)) == set()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_state_goes_into_a_fresh_model():
    model, fresh = build("classifier"), build("classifier")
    attachment = attach(model, "last_layers", blocks=1)
    train(model, attachment)
    other = attach(fresh, "last_layers", blocks=1)
    stored = {name: tensor.detach().clone() for name, tensor in attachment.state().items()}
    other.load(stored)
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    stored.popitem()
    with pytest.raises(CheckpointError, match="lacks tensor"):
        other.load(stored)


def test_bitfit_trains_biases_and_nothing_else():
    model = build("classifier")
    before = values(model)
    attachment = attach(model, "bitfit")
    train(model, attachment)
    assert set(attachment.trained()) == {name for name in before if name.endswith(".bias")}
    moved = changed(before, values(model))
    assert moved <= set(attachment.trained())
    assert "bert.encoder.layer.0.attention.output.LayerNorm.bias" in moved
    assert attachment.sites == []


def test_bitfit_says_that_llama_has_no_bias():
    with pytest.raises(OptionError, match="LlamaForCausalLM has none"):
        attach(build("llama"), "bitfit")


@pytest.mark.parametrize(
    ("name", "options", "starts"),
    [
        ("classifier", {"blocks": 1}, ("bert.encoder.layer.1.", "bert.pooler.", "classifier.")),
        ("classifier", {"blocks": 2, "head": False}, ("bert.encoder.layer.",)),
        ("bert", {"blocks": 0}, ("pooler.",)),
        ("llama", {"blocks": 1}, ("model.layers.1.", "lm_head.")),
        ("gpt2", {"blocks": 1}, ("transformer.h.1.",)),
        ("t5", {"blocks": 1, "head": False}, ("encoder.block.0.", "decoder.block.0.")),
    ],
)
def test_last_layers_trains_the_end(name, options, starts):
    model = build(name)
    attachment = attach(model, "last_layers", **options)
    assert set(attachment.trained()) == {n for n, _ in model.named_parameters() if n.startswith(starts)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(attachment.trained())
    outside = next(site for site in attach(build(name), "full").sites if site.key.role == "embed")
    assert not attachment.delta(outside).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"blocks": 3}, "the model has 2 blocks"),
        ("gpt2", {"blocks": 0}, "has no head of its own"),
        ("llama", {"blocks": 0, "head": False}, "expected one or more"),
        ("llama", {"blocks": -1}, "expected one or more"),
    ],
)
def test_last_layers_refuses_what_trains_nothing(name, options, message):
    with pytest.raises(OptionError, match=message):
        attach(build(name), "last_layers", **options)


def test_originals_are_read_from_elsewhere_and_clones_freed():
    model = build("gpt2")
    before = values(model)
    attachment = attach(model, "full")
    clone = weakref.ref(attachment.originals("transformer.wte.weight"))
    asked = []

    def read(name):
        asked.append(name)
        return before[name]

    attachment.originals = read
    assert clone() is None
    train(model, attachment)
    site = next(site for site in attachment.sites if site.key.role == "up_proj")
    dense = (model.state_dict()[f"{site.path}.weight"].double() - before[f"{site.path}.weight"].double()).T
    assert torch.equal(attachment.delta(site), dense)
    assert asked == [f"{site.path}.weight"]
    attachment.detach()
    assert changed(before, values(model)) == set()


@pytest.mark.parametrize("name", ["classifier", "llama", "gpt2"])
def test_compacter_trains_norms_of_a_narrow_model_in_float32(name):
    """Steps of 1e-5, which bf16 would round away at 1; what runs stays bf16, and the base gets its bits back."""
    model = build(name).bfloat16()
    before, start = values(model), model(input_ids=IDS)[0]
    freeze(model)
    sites = choose_sites(model, TargetOptions("o_proj,down_proj"))
    options = METHODS["compacter"].options(factors=2, reduction=4)
    attachment = METHODS["compacter"].attach(model, sites, options, name="default", seed=0)
    found = model(input_ids=IDS)[0]
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), start.float(), atol=0.05)
    optimizer = torch.optim.SGD(attachment.trained().values(), lr=1e-5)
    found.float().square().mean().backward()
    norms = attachment.norms.parameters
    wanted = {n: before[n].double() - 1e-5 * p.grad.double() for n, p in norms.items()}
    optimizer.step()
    assert all(torch.allclose(norms[n].double(), wanted[n], rtol=1e-7, atol=0) for n in norms)
    weights = [n for n in norms if n.endswith("weight")]
    assert weights and all(not torch.equal(norms[n], before[n].float()) for n in weights)
    attachment.detach()
    assert not changed(before, values(model))
    assert torch.equal(model(input_ids=IDS)[0], start)
