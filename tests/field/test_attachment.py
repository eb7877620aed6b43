"""Factors attach where they say, or are not written; what an adapter holds that would not attach is said."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.errors import NumericalError, PairingError
from deltaspec.options import ExtractOptions, FormOptions, RankOptions
from deltaspec.workflows.merging.merge import merge
from deltaspec.workflows.verification.verify import verify
from tests.oracle.parity import QUIET

pytestmark = QUIET
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60}
FULL = ExtractOptions(ranks=RankOptions(amounts=(99,)), form=FormOptions(dtype="fp32", extras="none"))
IDS = torch.arange(3, 15).reshape(2, 6)


def tune(folder, cls, **settings):
    """Save a random model and a fine-tune of it, every parameter changed."""
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    model.save_pretrained(folder / "base")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def extract(folder, base, tuned):
    """Extract at full rank; returns the report."""
    return deltaspec.extract(base, tuned, folder / "lora", options=FULL)["rank-99"]


def merged_by_peft(cls, base, adapter):
    """Let PEFT load an adapter onto the base, without complaint, and merge it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT warns of tied embeddings
        warnings.filterwarnings("error", message=".*(missing|unexpected) .*keys")
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
        return model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("cls", "settings", "odd"),
    [
        # a table of position biases, stored as any matrix
        (transformers.MPNetModel, {**SIZES, "relative_attention_num_buckets": 8}, "relative_attention_bias"),
        # experts stored one by one under a block's old name, and a router that is no plain linear layer
        (
            transformers.PhimoeForCausalLM,
            {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
            "experts",
        ),
        # positions that are read with an offset
        (
            transformers.OPTForCausalLM,
            {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "pad_token_id": 1}
            | {"tie_word_embeddings": False},
            "embed_positions",
        ),
    ],
)
def test_every_factor_reaches_what_it_was_made_for(cls, settings, odd, tmp_path):
    base, tuned = tune(tmp_path, cls, **settings)
    report = extract(tmp_path, base, tuned)
    assert report["attachment"] == f"checked with transformers {transformers.__version__} {cls.__name__}"
    left = {row["tensor"] for row in report["not_carried"]}
    before, after = (cls.from_pretrained(folder).state_dict() for folder in (base, tuned))
    found = merged_by_peft(cls, base, tmp_path / "lora")
    moved = [name for name in before if before[name].ndim > 1 and not torch.equal(found[name], before[name])]
    assert any(odd in name for name in moved)
    for name in moved:
        assert torch.allclose(found[name], after[name], atol=1e-5), name
    assert not {name for name in before if before[name].ndim > 1} - set(moved) - left
    assert verify(base, tuned, tmp_path / "lora").unattached == ()


def test_a_weight_that_the_model_reads_itself_gets_no_factors(tmp_path):
    """Mamba multiplies by dt_proj's weight; PEFT would load factors of it, and nothing would call them."""
    cls = transformers.MambaForCausalLM
    base, tuned = tune(tmp_path, cls, vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
    left = {row["tensor"]: row["reason"] for row in extract(tmp_path, base, tuned)["not_carried"]}
    assert "reads this weight itself" in left["backbone.layers.0.mixer.dt_proj.weight"]
    target = "backbone.layers.0.mixer.dt_proj"
    model = peft.get_peft_model(
        cls.from_pretrained(base), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    )
    model.eval().save_pretrained(tmp_path / "idle")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, cls.from_pretrained(base)(IDS).logits, atol=1e-5)
    with pytest.raises(PairingError, match="do nothing where PEFT runs it"):
        merge(base, [tmp_path / "idle"], tmp_path / "merged")
    (said,) = verify(base, tuned, tmp_path / "idle").unattached
    assert said.startswith(f"'{target}' (the model reads this weight itself")


def test_an_adapter_under_names_of_the_file_is_not_certified(tmp_path):
    """Stored under names that PEFT does not know, the factors are the right ones and change nothing."""
    cls = transformers.GPTNeoXForCausalLM
    base, tuned = tune(tmp_path, cls, **SIZES)
    extract(tmp_path, base, tuned)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    state = {name.replace("gpt_neox.", "", 1): tensor for name, tensor in load_file(file).items()}
    save_file(state, file)
    found = verify(base, tuned, tmp_path / "lora")
    assert found.unattached
    assert all("in transformers" in said or "has no module of this name" in said for said in found.unattached)


def test_where_the_model_is_not_known_that_is_said(tmp_path):
    base, tuned = tune(tmp_path, transformers.LlamaForCausalLM, **SIZES)
    for folder in (base, tuned):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    report = extract(tmp_path, base, tuned)
    why = f"not checked (transformers {transformers.__version__} does not know model_type 'mine')"
    assert report["attachment"] == why
    assert why in (tmp_path / "lora" / "README.md").read_text()
    assert verify(base, tuned, tmp_path / "lora").attachment == why


def test_factors_that_the_adapters_own_config_leaves_out_are_not_certified(tmp_path):
    """PEFT loads what target_modules lists, whatever else the file holds."""
    cls = transformers.LlamaForCausalLM
    base, tuned = tune(tmp_path, cls, **SIZES)
    extract(tmp_path, base, tuned)
    path = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    kept = [name for name in config["target_modules"] if "q_proj" not in name]
    path.write_text(json.dumps({**config, "target_modules": kept}))
    found = verify(base, tuned, tmp_path / "lora").unattached
    assert [said.partition(" ")[0] for said in found] == [
        f"'model.layers.{i}.self_attn.q_proj'" for i in range(SIZES["num_hidden_layers"])
    ]
    before = cls.from_pretrained(base).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = (
            peft.PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "lora").merge_and_unload().state_dict()
        )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[name], before[name])


def test_factors_that_hold_nan_are_one_sentence(tmp_path):
    base, tuned = tune(tmp_path, transformers.LlamaForCausalLM, **SIZES)
    extract(tmp_path, base, tuned)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "q_proj.lora_A" in name)
    state[name][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(NumericalError, match="its factors hold NaN or infinity"):
        verify(base, tuned, tmp_path / "lora")


def test_what_the_base_lacks_is_said_or_refused(tmp_path):
    """A head that is neither stored nor tied is drawn at random on loading; a block that is not there gets nothing."""
    cls = transformers.LlamaForCausalLM
    base, tuned = tune(tmp_path, cls, **SIZES)
    extract(tmp_path, base, tuned)
    state = load_file(base / "model.safetensors")
    headless = tmp_path / "headless"
    headless.mkdir()
    save_file({name: w for name, w in state.items() if name != "lm_head.weight"}, headless / "model.safetensors")
    (headless / "config.json").write_text((base / "config.json").read_text())
    lora = tmp_path / "q"
    model = peft.get_peft_model(cls.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(lora)
    notes = merge(headless, [lora], tmp_path / "merged").notes
    assert any("stores no 'lm_head.weight'" in note and "at random" in note for note in notes)
    file = lora / "adapter_model.safetensors"
    beyond = {"base_model.model.model.layers.7.input_layernorm.weight": torch.ones(16)}
    save_file({**load_file(file), **beyond}, file)
    with pytest.raises(PairingError, match="layers.7.input_layernorm.weight', which transformers .* does not have"):
        merge(base, [lora], tmp_path / "other")
