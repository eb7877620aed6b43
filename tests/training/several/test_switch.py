"""Adapters switched, weighted, merged and taken off in any order, against dense weights written into a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.several.mixed_batch import MixedBatch
from deltaspec.training.several.switching import Adapters
from deltaspec.training.sites.adapted import Adapted
from deltaspec.training.sites.attachment import Attachment, freeze
from deltaspec.training.sites.model_sites import base_parameters
from deltaspec.training.sites.targets import choose_sites
from tests import tiny_models

IDS = torch.tensor([[5, 7, 9, 11, 6, 8], [20, 4, 10, 3, 12, 14]])
RANK, ALPHA = 3, 5.0
TARGETS = {  # GPT-2's attention is one matrix of three; its rows begin at 0, 16 and 32
    "gpt2": ["all", "c_attn,c_fc", "q_proj", "k_proj,v_proj,o_proj", "wte"],
    "llama": ["all", "q_proj,v_proj", "embed,down_proj", "lm_head"],
}
LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}
BIASES = {"lora_bias": True, "bias": "all"}
MERGED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "dora": ("llama", [{"dora": True}]),
    "dora, two": ("gpt2", [{"dora": True}, {"dora": True, "targets": "c_attn,wte"}]),
    "pissa": ("llama", [{"init": "pissa"}, {"rslora": True}]),
    "biases": ("gpt2", [{**BIASES}, {"targets": "k_proj", **BIASES}]),
    "encoder": ("classifier", [{"bias": "lora_only"}, {"targets": "word_embeddings,query"}]),
    "shared": ("gpt2", [{"method": "vera"}, {"method": "tied", "targets": "v_proj,c_fc"}]),
    "own directions": ("llama", [{"method": "lora_xs", "rank": 4}, {"targets": "mlp"}]),
}
UNMERGEABLE: dict[str, dict[str, Any]] = {
    "series": {},
    "parallel": {},
    "compacter": {"factors": 2, "reduction": 4},
    "prefix": {},
    "bitfit": {},
}
PARTS = {"q_proj": slice(0, 16), "k_proj": slice(16, 32), "v_proj": slice(32, 48)}


def attach(model: Any, name: str, *, targets: str = "all", method: str = "lora", **options: Any) -> Attachment:
    """Attach an adapter, moved far from where it starts."""
    freeze(model)
    line = METHODS[method]
    sites = choose_sites(model, TargetOptions(targets))
    chosen = line.options(**({"rank": RANK, "alpha": ALPHA} if method == "lora" else {}) | options)
    found = line.attach(model, sites, chosen, name=name, seed=0)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter in found.trained().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return found


def write_dense(model: Any, attachment: Attachment, weight: float) -> None:
    """Add weight · (α/r) B A to a model's own weights, from the stored tensors alone."""
    stored = {name.removeprefix("base_model.model."): tensor for name, tensor in attachment.state().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, first in stored.items():
        if not name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        site = name.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
        second = stored[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        change = weight * ALPHA / RANK * (second.double() @ first.double())
        path, _, part = site.rpartition(".")
        whole = f"{site}.weight" in parameters
        target = parameters[f"{site}.weight" if whole else f"{path}.weight"]
        conv1d = type(model.get_submodule(site if whole else path)).__name__ == "Conv1D"
        matrix = target.data.T if conv1d else target.data
        matrix = matrix if whole else matrix[PARTS[part]]
        matrix += change.T if "embedding" in name else change


class Switching(RuleBasedStateMachine):
    """Every order of attaching, weighting, merging, unmerging and taking off."""

    @initialize(kind=st.sampled_from(sorted(TARGETS)))
    def start(self, kind: str) -> None:
        self.kind, self.model = kind, tiny_models.build(kind, **{LAYERS[kind]: 1})
        self.base = copy.deepcopy(self.model)
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.parameters = dict(self.model.named_parameters())
        self.adapters = Adapters(self.model)
        self.expected: dict[str, float] = {}
        self.merged, self.count = False, 0

    def refused_if_merged(self, change: Callable[[], object]) -> bool:
        """Make a change, which must fail while merged."""
        if not self.merged:
            change()
            return False
        with pytest.raises(OptionError, match="are merged"):
            change()
        return True

    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        targets, name = data.draw(st.sampled_from(TARGETS[self.kind])), f"a{self.count}"
        if len(self.adapters.attachments) > 3:
            return
        if not self.refused_if_merged(lambda: self.adapters.add(attach(self.model, name, targets=targets))):
            self.count += 1
            self.expected[name] = 1.0

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.permutations(list(self.adapters.attachments)))
        chosen = names[: data.draw(st.integers(0, len(names)))]
        weights = {name: data.draw(st.sampled_from([0.0, 0.5, 1.0, -1.0])) for name in chosen}
        if not self.refused_if_merged(lambda: self.adapters.activate(weights)):
            self.expected = {name: weight for name, weight in weights.items() if weight}

    @rule()
    def merge(self) -> None:
        if not self.refused_if_merged(self.adapters.merge):
            self.merged = bool(self.expected)

    @rule()
    def unmerge(self) -> None:
        self.adapters.unmerge()
        self.merged = False

    @precondition(lambda self: self.adapters.attachments)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.adapters.attachments)))
        if not self.refused_if_merged(lambda: self.adapters.detach(name)):
            self.expected.pop(name, None)

    @rule()
    def name_an_unknown_one(self) -> None:
        for change in (lambda: self.adapters.activate({"nobody": 1.0}), lambda: self.adapters.detach("nobody")):
            with pytest.raises(OptionError, match="no adapter 'nobody'"):
                change()

    @invariant()
    def outputs_are_those_of_dense_weights(self) -> None:
        assert self.adapters.active == self.expected and list(self.adapters.active) == list(self.expected)
        oracle = copy.deepcopy(self.base)
        oracle.lm_head.weight = nn.Parameter(oracle.lm_head.weight.detach().clone())  # the head stays as it is
        for name, weight in self.expected.items():
            write_dense(oracle, self.adapters.attachments[name], weight)
        with torch.no_grad():
            expected, found = (model(input_ids=IDS).logits for model in (oracle, self.model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    @invariant()
    def the_base_is_untouched(self) -> None:
        now, before = base_parameters(self.model), dict(self.base.named_parameters())
        assert now.keys() == self.parameters.keys() and all(now[name] is self.parameters[name] for name in now)
        assert all(torch.equal(now[name], before[name]) for name in now)
        if not self.adapters.attachments:
            found = dict(self.model.named_modules(remove_duplicate=False))
            assert found.keys() == self.modules.keys() and all(found[name] is self.modules[name] for name in found)


TestSwitching = Switching.TestCase
TestSwitching.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MERGED)
@torch.no_grad()
def test_merged_is_unmerged(case: str, dtype: torch.dtype) -> None:
    """Every kind of change of weights, in pairs at other weights than 1, biases among them."""
    kind, pair = MERGED[case]
    model = tiny_models.build(kind).to(dtype)
    before = model(input_ids=IDS).logits
    adapters = Adapters(model, [attach(model, f"a{number}", **chosen) for number, chosen in enumerate(pair)])
    adapters.activate(dict(zip(reversed(adapters.attachments), (0.5, -0.75), strict=False)))
    expected = model(input_ids=IDS).logits
    adapters.merge()
    found = model(input_ids=IDS).logits
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    adapters.unmerge()
    assert torch.equal(model(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_an_embedding_that_scales() -> None:
    """Gemma's multiplies what it looks up: so must merged weights, and rows that use different adapters."""
    model = tiny_models.build("llama")
    plain = model.model.embed_tokens
    scaled = Gemma3TextScaledWordEmbedding(*plain.weight.shape, padding_idx=0, embed_scale=4.0)
    scaled.weight = plain.weight
    model.model.embed_tokens = scaled
    adapters = Adapters(model, [attach(model, "a", targets="embed"), attach(model, "b", targets="embed")])
    adapters.activate({"b": 1.0})
    expected = model(input_ids=IDS).logits
    oracle = copy.deepcopy(model)
    oracle.model.embed_tokens = oracle.model.embed_tokens.base
    write_dense(oracle, adapters.attachments["b"], 1.0)
    torch.testing.assert_close(expected, oracle(input_ids=IDS).logits)
    adapters.merge()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    adapters.unmerge()
    mixed = MixedBatch(model, list(adapters.attachments.values()))
    mixed.select(["a", "b"])
    torch.testing.assert_close(model(input_ids=IDS).logits[1], expected[1])


def test_a_merged_weight_is_rounded_once() -> None:
    model = tiny_models.build("llama").bfloat16()
    adapters = Adapters(model, [attach(model, name, targets="up_proj") for name in "abc"])
    wrapper = model.model.layers[0].mlp.up_proj
    total = wrapper.weight.detach().double().numpy()
    for name, update in zip("abc", wrapper.updates.values(), strict=True):
        first, second = (update.tensors()[f"lora_{side}.weight"].detach().double().numpy() for side in "AB")
        total = total + {"a": 1.0, "b": 0.5, "c": -0.25}[name] * (ALPHA / RANK) * second @ first
    adapters.activate({"a": 1.0, "b": 0.5, "c": -0.25})
    adapters.merge()
    assert torch.equal(wrapper.run.weight, torch.from_numpy(total).bfloat16())
    assert wrapper.run.weight.dtype == torch.bfloat16 and not wrapper.run.weight.requires_grad


@pytest.mark.parametrize("method", UNMERGEABLE)
@torch.no_grad()
def test_what_has_no_weight_change_is_switched_but_not_merged(method: str) -> None:
    model = tiny_models.build("gpt2")
    before = model(input_ids=IDS).logits
    other = attach(model, "other", method=method, targets=METHODS[method].sites or "all", **UNMERGEABLE[method])
    adapters = Adapters(model, [attach(model, "lora"), other])
    both = model(input_ids=IDS).logits
    with pytest.raises(OptionError, match="Cannot merge the adapter 'other'"):
        adapters.merge()
    assert torch.equal(model(input_ids=IDS).logits, both)
    adapters.activate({"lora": 1.0})
    adapters.merge()
    assert not torch.allclose(model(input_ids=IDS).logits, both)
    adapters.unmerge()
    adapters.activate({})
    assert torch.equal(model(input_ids=IDS).logits, before)
    adapters.detach("lora")
    adapters.detach("other")
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_names_and_refused_weights() -> None:
    model = tiny_models.build("llama")
    adapters = Adapters(model, [attach(model, "keys"), attach(model, "p", method="prefix")])
    with pytest.raises(OptionError, match="an adapter 'keys'"):
        attach(model, "keys")
    with pytest.raises(OptionError, match="cannot have the name 'a.b'"):
        attach(model, "a.b")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with pytest.raises(OptionError, match="virtual tokens"):
            adapters.activate({"keys": 0.5, "p": 0.5})
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert adapters.active == {"keys": 1.0, "p": 1.0}
