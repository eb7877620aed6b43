"""A batch whose rows use different adapters against its rows one by one, for every method with factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.several.mixed_batch import MixedBatch
from deltaspec.training.several.switching import Adapters
from deltaspec.training.sites.adapted import Adapted
from deltaspec.training.sites.attachment import Attachment, freeze
from deltaspec.training.sites.targets import choose_sites
from tests import tiny_models

LORA = {"rank": 3, "alpha": 5.0}
EVERYWHERE: dict[str, tuple[str, str, dict[str, Any]]] = {  # by adapter: method, targets, options
    "narrow": ("lora", "q_proj,down_proj", {"rank": 1, "rslora": True}),
    "pissa": ("lora", "all", {"rank": 2, "init": "pissa"}),
    "vera": ("vera", "all", {"rank": 5}),
    "tied": ("tied", "mlp", {"rank": 3}),
    "vblora": ("vblora", "attention", {"rank": 2, "vectors": 12, "vector_length": 8, "topk": 3}),
    "xs": ("lora_xs", "all", {"rank": 4}),
    "biased": ("lora", "o_proj,up_proj", LORA | {"lora_bias": True}),
}
FUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whole": ("lora", "c_attn,c_proj,wte", LORA),
    "values": ("lora", "v_proj", LORA | {"bias": "all"}),
    "queries": ("vera", "q_proj,v_proj,c_fc", {"rank": 2}),
    "tokens": ("lora", "embed", LORA | {"rank": 2}),
}
ENCODER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pooled": ("lora", ".*pooler.dense|.*query", LORA | {"bias": "lora_only"}),
    "words": ("lora", "word_embeddings,value", LORA),
}
CASES = {"llama": EVERYWHERE, "tied": {"tokens": ("lora", "embed,lm_head", LORA)}, "gpt2": FUSED, "classifier": ENCODER}
ROWS = 9


def attach(model: Any, adapters: dict[str, tuple[str, str, dict[str, Any]]]) -> dict[str, Attachment]:
    """Attach adapters, each moved far from where it starts."""
    freeze(model)
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, (method, targets, options) in adapters.items():
        line = METHODS[method]
        sites = choose_sites(model, TargetOptions(targets))
        found[name] = line.attach(model, sites, line.options(**options), name=name, seed=len(found))
        with torch.no_grad():
            for parameter in found[name].trained().values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def tokens(rows: int = ROWS, length: int = 6) -> torch.Tensor:
    return torch.randint(0, len(tiny_models.VOCAB), (rows, length), generator=torch.Generator().manual_seed(rows))


def one_by_one(model: Any, adapters: dict[str, Attachment], ids: torch.Tensor, rows: list[str | None]) -> torch.Tensor:
    """Run each row alone, with its adapter alone."""
    found = []
    for number, row in enumerate(rows):
        for name, attachment in adapters.items():
            attachment.enable(float(name == row))
        found.append(model(input_ids=ids[number : number + 1]).logits)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_rows_as_if_alone(case: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(case).to(dtype)
    adapters = attach(model, CASES[case])
    rows: list[str | None] = [*adapters, None, *adapters][:ROWS]
    rows += [None] * (ROWS - len(rows))
    ids = tokens()
    expected = one_by_one(model, adapters, ids, rows)
    plain = one_by_one(model, adapters, ids, [None] * ROWS)
    mixed = MixedBatch(model, list(adapters.values()))
    torch.testing.assert_close(model(input_ids=ids).logits, plain)
    mixed.select(rows)
    found = model(input_ids=ids).logits
    effect = (expected - plain).flatten(1).abs().amax(1)
    assert all(effect[number] > 0.01 for number, row in enumerate(rows) if row), effect
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    none = [number for number, row in enumerate(rows) if row is None]
    torch.testing.assert_close(found[none], plain[none])
    for name in adapters:  # one for all rows of any batch
        mixed.select(name)
        alone = one_by_one_mixed(model, ids[:2])
        torch.testing.assert_close(model(input_ids=ids[:2]).logits, alone)


@torch.no_grad()
def test_a_mapping_is_as_good_as_a_sequence() -> None:
    """What Adapters holds goes into a mixed batch as it is."""
    model = tiny_models.build("llama")
    adapters = attach(model, {"a": ("lora", "all", LORA), "b": ("vera", "all", {"rank": 2})})
    held = Adapters(model, adapters)
    assert held.attachments == adapters
    expected = one_by_one(model, adapters, tokens(2), ["b", "a"])
    mixed = MixedBatch(model, held.attachments)
    mixed.select(["b", "a"])
    torch.testing.assert_close(model(input_ids=tokens(2)).logits, expected, rtol=1e-4, atol=1e-4)


def one_by_one_mixed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(input_ids=row[None]).logits for row in ids])


def test_gradients_reach_the_inputs() -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, {"a": ("lora", "all", LORA), "b": ("vera", "all", {"rank": 2})})
    gradients = []
    for mix in (False, True):
        inputs = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        if mix:
            MixedBatch(model, list(adapters.values())).select(["b", "a"])
            model(inputs_embeds=inputs).logits.square().sum().backward()
        else:
            for number, name in enumerate("ba"):
                for other, attachment in adapters.items():
                    attachment.enable(float(other == name))
                model(inputs_embeds=inputs[number : number + 1]).logits.square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))


@torch.no_grad()
def test_switching_compiles_nothing_again() -> None:
    """Rows, or all rows, choose other adapters in a model that is compiled once for each of both."""
    model = tiny_models.build("llama", num_hidden_layers=1)
    adapters = attach(model, dict.fromkeys("abc", ("lora", "all", LORA)))
    ids = tokens(4)
    mixed = MixedBatch(model, list(adapters.values()))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for choices in (("a", "b", None, "c"), ([*"abca"], [*"ccba"], ["b", None, None, "a"])):
        seen = []
        for choice in choices:
            mixed.select(choice)
            found = compiled(input_ids=ids).logits
            torch.testing.assert_close(found, model(input_ids=ids).logits)
            seen.append((counter.frame_count, found))
        assert len({count for count, _ in seen}) == 1 and seen[0][0] > 0
        assert not any(torch.allclose(seen[0][1], found) for _, found in seen[1:])
    torch._dynamo.reset()


def test_close_gives_everything_back() -> None:
    model = tiny_models.build("gpt2")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = attach(model, FUSED)
    names, ids = set(model.state_dict()), tokens(2)
    before = model(input_ids=ids).logits
    mixed = MixedBatch(model, [adapters["whole"]])
    mixed.select("whole")
    assert set(model.state_dict()) == names
    assert not torch.allclose(model(input_ids=ids).logits, before)
    mixed.close()
    mixed.close()
    assert torch.equal(model(input_ids=ids).logits, before)
    for attachment in adapters.values():
        attachment.detach()
    assert not any(isinstance(module, Adapted) for module in model.modules())
    found = model.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_refusals_change_nothing() -> None:
    model = tiny_models.build("llama")
    fit = {"a": ("lora", "all", LORA), "b": ("lora", "q_proj", LORA)}
    adapters = attach(model, fit)
    others = attach(model, {"dora": ("lora", "v_proj", LORA | {"dora": True}), "beside": ("parallel", "up_proj", {})})
    for name, attachment in others.items():
        with pytest.raises(OptionError, match=f"Cannot mix the adapter '{name}'"):
            MixedBatch(model, [*adapters.values(), attachment])
        attachment.detach()
    ids = tokens(2)
    mixed = MixedBatch(model, list(adapters.values()))
    mixed.select(["a", "b"])
    expected = model(input_ids=ids).logits
    with pytest.raises(OptionError, match="Cannot select the adapter 'c'"):
        mixed.select(["a", "c"])
    with pytest.raises(OptionError, match=r"has 2 rows, but 'model\.layers\.0\.self_attn\.q_proj' got a batch of 3"):
        model(input_ids=tokens(3))
    with pytest.raises(OptionError, match=r"merged, or mixed by row"):
        MixedBatch(model, [adapters["a"]])
    for change in (lambda: attach(model, {"c": fit["a"]}), lambda: adapters["a"].enable(0.5), adapters["b"].detach):
        with pytest.raises(OptionError, match=r"merged, or mixed by row"):
            change()
    assert torch.equal(model(input_ids=ids).logits, expected)
