"""What stands beside factors in an adapter, and adapters that PEFT wrote itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from deltaspec.architecture.views import view_matrix
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import open_plain
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter
from deltaspec.types import Entry
from tests.oracle.parity import (
    QUIET,
    TIED,
    assert_parity,
    assert_read_back,
    distance,
    load,
    make_case,
    outputs,
    store,
    without,
    write_tuned,
)

pytestmark = QUIET
WHOLE = {
    "llama": r"norm\.weight|lm_head",
    "opt": r"layer_norm|embed_positions",
    "bert": r"LayerNorm|position_embeddings|pooler",
    "bart": r"layer_norm|layernorm|embed_positions",
    "whisper": r"layer_norm|embed_positions|encoder\.conv",
    "gpt2": r"ln_|wpe",
    "deberta": r"LayerNorm|rel_embeddings|classifier",
    "vit": r"layernorm|classifier",
    "gemma3_multimodal": r"norm|vision_tower\.head\.attention",
    "llava": r"norm|position_embedding",
    "mixtral": r"norm|gate",
    "qwen3_moe": r"norm|mlp\.gate\.",
    "deepseek_v3": r"norm|mlp\.gate\.",
    "granitemoe": r"norm|router",
    "gpt_oss": r"norm|router",
}


@pytest.mark.parametrize("name", WHOLE)
def test_tensors_stored_whole(name, tmp_path):
    """modules_to_save: norms, positions, routers and heads, beside factors for the rest."""
    case = make_case(name, tmp_path)
    generator = torch.Generator().manual_seed(6)
    whole = {
        key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in case.stored.items()
        if re.search(WHOLE[name], key) and tensor.is_floating_point()
    }
    case.factors = {
        key: pair for key, pair in case.factors.items() if key not in whole and case.kinds[key] != "embedding"
    }
    full = [Entry(k, tuple(t.shape), "F32", lambda t=t: t) for k, t in whole.items()]
    without(case, store(case, tmp_path / "adapter", full=full))
    write_tuned(case, whole)
    assert_parity(case, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"]
    adapter = open_plain(tmp_path / "adapter")
    plan = pair_adapter(case.checkpoint, adapter, AnalyzeOptions(device="cpu"))
    paired = {v.key.tensor for v in plan.vectors} | {p.base.spec.name for p in plan.pairs}
    assert set(whole) | set(case.factors) <= paired


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_stored_whole_serves_all_its_uses(name, tmp_path):
    case = make_case(name, tmp_path)
    (key,) = [key for key, kind in case.kinds.items() if kind == "embedding" and "type" not in key]
    changed = case.stored[key] + 0.2 * torch.randn(case.stored[key].shape, generator=torch.Generator().manual_seed(4))
    case.factors = {k: pair for k, pair in case.factors.items() if case.kinds[k] in ("linear", "conv1d")}
    full = [Entry(key, tuple(changed.shape), "F32", lambda: changed)]
    without(case, store(case, tmp_path / "adapter", full=full))
    write_tuned(case, {key: changed})
    assert_parity(case, tmp_path / "adapter")


@pytest.mark.parametrize(("name", "listed"), [
    ("mixtral_stacked", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ("mixtral", ["model.layers.0.mlp.experts.gate_up_proj", "experts.down_proj", "gate.weight"]),
    ("qwen3_moe_stacked", ["experts.down_proj"]),
    ("granitemoe", ["experts.gate_up_proj", "experts.down_proj"]),
    ("gpt_oss", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "router.weight"]),
    ("llama4", ["experts.gate_up_proj", "experts.down_proj"]),
])  # fmt: skip
def test_stacks_that_peft_itself_saved(name, listed, tmp_path):
    """Our reader finds in PEFT's own target_parameters adapter what PEFT's merge adds to each weight."""
    case = make_case(name, tmp_path)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=listed, rank_pattern={"down_proj": 2}
    )
    model = peft.get_peft_model(load(case.base), settings)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    if name.endswith("_stacked"):
        after = merged.state_dict()
    else:
        merged.save_pretrained(tmp_path / "merged")
        after = load_file(tmp_path / "merged" / "model.safetensors")
    plan = pair_adapter(case.checkpoint, open_plain(tmp_path / "adapter"), AnalyzeOptions(device="cpu"))
    changed = {key for key, tensor in case.stored.items() if not torch.equal(after[key], tensor)}
    assert {pair.base.spec.name for pair in plan.pairs} == changed
    assert any("experts" in key or "linear" in key for key in changed)
    for pair in plan.pairs:
        name = pair.base.spec.name
        found = read_low_rank(pair.tuned)
        wanted = view_matrix(after[name].double() - case.stored[name].double(), pair.base.view)
        assert torch.allclose(found.lora_B @ found.lora_A, wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "loader"), [
    ("llama", peft.AutoPeftModelForCausalLM),
    ("t5", peft.AutoPeftModelForSeq2SeqLM),
    ("roberta", peft.AutoPeftModel),
])  # fmt: skip
def test_the_adapter_alone_finds_its_base(name, loader, tmp_path, monkeypatch):
    """The base's folder is named in full, so that no relative path is taken for a hub id."""
    case = make_case(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    case = replace(case, base=case.base.relative_to(tmp_path))
    store(case, tmp_path / "adapter")
    write_tuned(case)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("{}")  # else PEFT asks the hub for one
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: [])
    monkeypatch.chdir("/")
    model = loader.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert distance(outputs(model), outputs(load(case.tuned))) <= 1e-5


def test_experts_alone(tmp_path):
    """target_parameters and no target_modules."""
    case = make_case("mixtral", tmp_path)
    case.factors = {key: pair for key, pair in case.factors.items() if "experts" in key}
    assert not store(case, tmp_path / "adapter")
    write_tuned(case)
    assert_parity(case, tmp_path / "adapter")
    assert_read_back(case, tmp_path / "adapter")


def test_whole_tensors_alone(tmp_path):
    case = make_case("llama", tmp_path)
    case.factors = {}
    changed = case.stored["model.norm.weight"] * 1.5
    full = [Entry("model.norm.weight", tuple(changed.shape), "F32", lambda: changed)]
    assert not store(case, tmp_path / "adapter", full=full)
    write_tuned(case, {"model.norm.weight": changed})
    assert_parity(case, tmp_path / "adapter")
