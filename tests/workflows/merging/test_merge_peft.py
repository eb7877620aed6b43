"""Our merge of PEFT's own folders against PEFT's merge_and_unload, in float32, tensor by tensor."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from deltaspec.workflows.merging.merge import merge
from tests.oracle.models import build
from tests.oracle.parity import distance, load, make_case, outputs, store, write_tuned

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "linear": ("llama", {"target_modules": ATTENTION}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
    "whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}),
    "bias": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "trained biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "interleaved": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "convolution": ("vit", {"target_modules": ["projection", "q_proj", "query"]}),
    "experts one by one": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "stacked experts": (
        "granitemoe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "transposed experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("case", CASES)
def test_peft_merges_to_the_same_tensors(case, tmp_path):
    family, settings = CASES[case]
    made = build(family)
    if family == "granitemoe" and not any(name.endswith("experts.down_proj") for name, _ in made.named_parameters()):
        pytest.skip("GraniteMoE has its experts under other names in this release of transformers, PEFT merges none")
    made.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(r=3, lora_alpha=5, **settings))
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:  # a B of zeros would hide errors
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
        assert parameter.requires_grad or "lora_" not in key
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "wanted", max_shard_size="1GB")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    report = merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out")
    found = {k: t for file in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(file).items()}
    stored = {k: t for file in (tmp_path / "base").glob("*.safetensors") for k, t in load_file(file).items()}
    assert found.keys() == wanted.keys() == stored.keys()
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in wanted.items()) < 2e-6
    changed = {name for name, tensor in stored.items() if not torch.equal(tensor, wanted[name])}
    assert changed == {row.key.tensor for row in report.rows}
    assert len(changed) >= 2


@pytest.mark.parametrize("name", ["qwen2_vl", "whisper", "t5", "deberta", "qwen3_moe", "mixtral_stacked", "llama4"])
def test_what_extraction_writes_merges_to_the_tuned_model(name, tmp_path):
    """Factors for every tensor that can have them, then the outputs of the merged model that transformers loads."""
    case = make_case(name, tmp_path)
    refused = store(case, tmp_path / "lora")
    for key in [key for key in case.factors if key.removesuffix(".weight") in refused]:
        del case.factors[key]
    write_tuned(case)
    merge(case.base, [tmp_path / "lora"], tmp_path / "out")
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(case.tuned / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert max(float((found[key] - tensor).abs().max()) for key, tensor in wanted.items()) < 1e-6
    if not re.search("stacked|llama4", name):  # in-memory layouts, which from_pretrained does not expect
        assert distance(outputs(load(tmp_path / "out")), outputs(load(case.tuned))) < 1e-5
