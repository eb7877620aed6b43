"""Adapters that PEFT loads from their files give the outputs of the checkpoint to which B·A was added."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from deltaspec.io.matrix import read_low_rank
from deltaspec.io.open import open_plain
from deltaspec.io.peft_writer import PeftForm, write_adapter
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter
from tests.oracle.models import BUILT
from tests.oracle.parity import (
    QUIET,
    TIED,
    Case,
    assert_parity,
    assert_read_back,
    make_case,
    store,
    without,
    write_tuned,
)

pytestmark = QUIET
UNTOUCHED = {  # what PEFT cannot hold factors for, by the reason that is given
    "gemma3_multimodal": {"vision_tower.head.attention.out_proj": "reads this weight itself"},
    "whisper": dict.fromkeys(("model.encoder.conv1", "model.encoder.conv2"), "reads 'stride' of this module"),
}


@pytest.mark.parametrize("name", BUILT)
def test_every_family(name, tmp_path):
    case = make_case(name, tmp_path)
    refused = store(case, tmp_path / "adapter")
    wanted = UNTOUCHED.get(name, {})
    assert refused.keys() == wanted.keys()
    assert all(reason in refused[path] for path, reason in wanted.items())
    without(case, refused)
    write_tuned(case)
    tied = name in TIED and any(kind == "embedding" for kind in case.kinds.values())
    assert_parity(case, tmp_path / "adapter", merge=not tied or name in ("roberta", "deberta"))
    assert_read_back(case, tmp_path / "adapter")


@pytest.mark.parametrize(("name", "renamed"), [
    ("gpt2", (r"^transformer\.", "")),
    ("bloom", (r"^transformer\.", "")),
    ("bert", (r"LayerNorm\.weight", "LayerNorm.gamma")),
    ("llava", (r"vision_tower\.", "vision_tower.vision_model.")),
    ("llava", (r"^language_model\.model\.", "model.language_model.")),
    ("gpt_neox", (r"^embed_out", "lm_head")),
])  # fmt: skip
def test_names_of_older_and_newer_files(name, renamed, tmp_path):
    """The same model under names that other versions saved; the adapter's are the running model's for all."""
    case = make_case(name, tmp_path, renamed=renamed)
    case.factors = {key: pair for key, pair in case.factors.items() if case.kinds[key] != "embedding"}
    assert not store(case, tmp_path / "adapter")
    write_tuned(case)
    assert_parity(case, tmp_path / "adapter")
    assert_read_back(case, tmp_path / "adapter")


@pytest.mark.parametrize("name", [name for name in TIED if name not in ("roberta", "deberta")])
def test_tied_families_merge_where_the_embedding_has_no_factors(name, tmp_path):
    """PEFT's merge adds to the shared weight once for each of its uses; deltaspec's own merge does not."""
    case = make_case(name, tmp_path)
    case.factors = {key: pair for key, pair in case.factors.items() if case.kinds[key] != "embedding"}
    without(case, store(case, tmp_path / "adapter"))
    write_tuned(case)
    assert_parity(case, tmp_path / "adapter")


def test_a_model_that_unties_its_head(tmp_path):
    """The head keeps the base's weight, or gets factors of its own, although the base ties it."""
    case = make_case("starcoder2", tmp_path)
    case.factors = {key: pair for key, pair in case.factors.items() if case.kinds[key] == "embedding"}
    (embedding,) = case.factors
    write_untied(case, case.stored[embedding])
    store(case, tmp_path / "embedding", untied=["lm_head.weight"])
    assert_parity(case, tmp_path / "embedding", merge=False)

    lora_A, lora_B = (torch.randn(f.shape, generator=torch.Generator().manual_seed(9)) for f in case.factors[embedding])
    head = replace(case.modules()[0], path="lm_head", kind="linear", read=lambda: (lora_A, lora_B))
    (tmp_path / "both").mkdir()
    modules = [*case.modules(), head]
    assert not write_adapter(tmp_path / "both", modules, [], base=case.checkpoint, form=PeftForm("fp32"))
    write_untied(case, case.stored[embedding] + lora_B @ lora_A)
    assert_parity(case, tmp_path / "both", merge=False)
    plan = pair_adapter(case.checkpoint, open_plain(tmp_path / "both"), AnalyzeOptions(device="cpu"))
    assert {str(pair.key) for pair in plan.pairs} == {embedding, "lm_head.weight"}
    found = read_low_rank(next(pair.tuned for pair in plan.pairs if str(pair.key) == "lm_head.weight"))
    assert torch.allclose(found.lora_B @ found.lora_A, lora_B.double() @ lora_A.double())


def write_untied(case: Case, head: torch.Tensor) -> None:
    write_tuned(case, {"lm_head.weight": head})
    config = json.loads((case.tuned / "config.json").read_text())
    (case.tuned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "clip", "mixtral", "gpt_oss", "llama4"])
def test_ranks_that_differ_and_factors_shorter_than_their_rank(name, rslora, tmp_path):
    """rank_pattern and alpha_pattern by full path; what is missing up to the stored rank is zeros."""
    case = make_case(name, tmp_path)
    case.factors = {key: pair for key, pair in case.factors.items() if case.kinds[key] != "embedding"}
    modules = [replace(m, rank=m.rank + i % 3) for i, m in enumerate(case.modules())]
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", modules, [], base=case.checkpoint, form=PeftForm("fp32", rslora))
    write_tuned(case)
    assert_parity(case, tmp_path / "adapter")
    assert_read_back(case, tmp_path / "adapter")


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_factors_of_two_bytes(dtype, kind, tmp_path):
    case = make_case("qwen3", tmp_path)
    case.factors = {k: tuple(f.to(kind).float() for f in pair) for k, pair in case.factors.items()}
    store(case, tmp_path / "adapter", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {kind}
    write_tuned(case)
    assert_parity(case, tmp_path / "adapter")
    assert_read_back(case, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "starcoder2", "clip", "vit"])
def test_biases_go_beside_the_factors(name, tmp_path):
    """FIELD's first failure: lora_B.bias is read only where the config says lora_bias."""
    case = make_case(name, tmp_path)
    linear = ("linear", "conv1d", "conv")
    case.factors = {
        key: pair
        for key, pair in case.factors.items()
        if case.kinds[key] in linear and f"{key.removesuffix('weight')}bias" in case.stored
    }
    generator = torch.Generator().manual_seed(5)
    biases = {f"{key.removesuffix('.weight')}.bias": None for i, key in enumerate(case.factors) if i % 2}
    biases = {key: torch.randn(case.stored[key].shape, generator=generator) for key in biases}
    modules = [
        replace(m, read_bias=(lambda change=biases[f"{m.path}.bias"]: change) if f"{m.path}.bias" in biases else None)
        for m in case.modules()
    ]
    (tmp_path / "adapter").mkdir()
    assert not write_adapter(tmp_path / "adapter", modules, [], base=case.checkpoint, form=PeftForm("fp32"))
    write_tuned(case, {key: case.stored[key] + change for key, change in biases.items()})
    assert_parity(case, tmp_path / "adapter")
    adapter = open_plain(tmp_path / "adapter")
    plan = pair_adapter(case.checkpoint, adapter, AnalyzeOptions(device="cpu"))
    assert {v.key.tensor for v in plan.vectors} == {f"{m.path}.bias" for m in modules}
