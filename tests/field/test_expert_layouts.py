"""Experts stacked on one side and stored one by one on the other: PEFT's own loading says what an adapter does."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import deltaspec
from deltaspec.errors import PairingError
from tests.families import write

SIZES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64, "num_experts_per_tok": 2},
    **{"num_experts": 3, "num_local_experts": 3, "moe_intermediate_size": 12, "tie_word_embeddings": False},
}
MODELS = {"olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM"}


def models(name, folder):
    """A base and a fine-tune whose matrices all moved, each with experts one by one and stacked."""
    torch.manual_seed(0)
    cls = getattr(transformers, MODELS[name])
    model = cls(cls.config_class(**SIZES)).eval()
    for side in ("base", "tuned"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape) * (parameter.ndim > 1)
        model.save_pretrained(folder / f"{side}-single")
        model.save_pretrained(folder / f"{side}-stacked", save_original_format=False)
    names = [" ".join(load_file(folder / f"base-{kind}" / "model.safetensors")) for kind in ("single", "stacked")]
    assert "experts.0." in names[0] and "experts.0." not in names[1]
    return cls, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapted(cls, base, adapter):
    """Return what PEFT makes of a base and an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def furthest(found, right):
    assert found.keys() == right.keys()
    return max(float((found[name] - right[name]).abs().max()) for name in right)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("base", "tuned"), [("stacked", "single"), ("single", "stacked"), ("stacked", "stacked")])
def test_a_full_rank_is_the_fine_tune_whatever_the_layouts(name, base, tuned, tmp_path):
    cls, right = models(name, tmp_path)
    folders = tmp_path / f"base-{base}", tmp_path / f"tuned-{tuned}"
    options = deltaspec.ExtractOptions(deltaspec.RankOptions(amounts=(48,)))
    (report,) = deltaspec.extract(*folders, tmp_path / "a", options=options).values()
    assert report["totals"]["kept"] == pytest.approx(1, abs=1e-6)
    assert not report["not_carried"]
    assert furthest(adapted(cls, folders[0], tmp_path / "a"), right) < 1e-5
    checked = deltaspec.verify(*folders, tmp_path / "a")
    assert not checked.worse and not checked.missing and checked.totals.error < 1e-5
    deltaspec.merge(folders[0], [tmp_path / "a"], tmp_path / "m")
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert furthest(merged, load_file(tmp_path / f"tuned-{base}" / "model.safetensors")) < 1e-5


@pytest.mark.parametrize(
    "ranks",
    [
        deltaspec.RankOptions(amounts=(3,)),
        deltaspec.RankOptions("energy", (0.7,)),
        deltaspec.RankOptions("params", (6000,)),
        deltaspec.RankOptions("size", (40000,)),
    ],
)
@pytest.mark.parametrize(("base", "tuned"), [("stacked", "single"), ("single", "stacked")])
def test_every_policy_writes_what_it_claims(ranks, base, tuned, tmp_path):
    """The error of what PEFT computes is that of the certificate, and budgets are kept."""
    cls, right = models("olmoe", tmp_path)
    folders = tmp_path / f"base-{base}", tmp_path / f"tuned-{tuned}"
    options = deltaspec.ExtractOptions(ranks)
    (report,) = deltaspec.extract(*folders, tmp_path / "a", options=options).values()
    before = cls.from_pretrained(folders[0], dtype=torch.float32).state_dict()
    found = adapted(cls, folders[0], tmp_path / "a")
    lost, whole = (
        sum(float((one[n].double() - right[n].double()).square().sum()) for n in right) for one in (found, before)
    )
    assert 1 - lost / whole == pytest.approx(report["totals"]["kept"], abs=1e-5)
    checked = deltaspec.verify(*folders, tmp_path / "a")
    assert not checked.worse and not checked.missing
    if ranks.policy == "params":
        assert report["totals"]["parameters"] == report["budget"]["spent"] <= 6000
    if ranks.policy == "size":
        assert report["totals"]["bytes"] <= 40000


def test_an_expert_that_the_tuned_model_lacks_gets_no_change(tmp_path):
    """A stack of three against two experts: the third stays as it is, and its matrices are listed."""
    cls, right = models("olmoe", tmp_path)
    state = load_file(tmp_path / "tuned-single" / "model.safetensors")
    pruned = {name: tensor for name, tensor in state.items() if "experts.1." not in name}
    tuned = write(
        tmp_path / "pruned", pruned, cls.config_class(**SIZES).to_dict() | {"architectures": [MODELS["olmoe"]]}
    )
    options = deltaspec.ExtractOptions(deltaspec.RankOptions(amounts=(48,)))
    deltaspec.extract(tmp_path / "base-stacked", tuned, tmp_path / "a", options=options)
    found = adapted(cls, tmp_path / "base-stacked", tmp_path / "a")
    before = cls.from_pretrained(tmp_path / "base-stacked", dtype=torch.float32).state_dict()
    for name, tensor in right.items():
        wanted = tensor.clone()
        if ".experts." in name:
            wanted[1] = before[name][1]
        assert torch.allclose(found[name], wanted, atol=1e-5), name


def test_experts_of_another_block_are_no_counterpart(tmp_path):
    """Layouts pair inside one block only: the same place in another path is another model's."""
    base = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(8, 6) for e in range(2)}
    tuned = {"other.blocks.0.mlp.experts.down_proj": torch.randn(2, 8, 6)}
    folders = [
        write(tmp_path / side, state, {"model_type": "qwen3_moe"}) for side, state in (("b", base), ("t", tuned))
    ]
    with pytest.raises(PairingError, match="Nothing in .* pairs"):
        deltaspec.analyze(*folders, tmp_path / "r")
