"""A hub's names against those of the running model: both sides of one vision-language model, PEFT as oracle."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import deltaspec
from tests.families import write

TEXT = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 64, "tie_word_embeddings": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}
VISION = {
    **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [1]},
}


def qwen(folder):
    """A base as the hub has it, and a fine-tune of which all matrices moved, in both namings."""
    torch.manual_seed(0)
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    model = cls(cls.config_class(text_config=TEXT, vision_config=VISION)).eval()
    for side in ("base", "tuned"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape) * (parameter.ndim > 1)
        model.save_pretrained(folder / side)
        config = json.loads((folder / side / "config.json").read_text())
        running = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        write(folder / f"{side}-running", running, config)
        bare = {n.removeprefix("model."): t for n, t in running.items() if n.startswith("model.")}
        write(folder / f"{side}-body", bare, config | {"architectures": ["Qwen2_5_VLModel"]})
    assert any(name.startswith("visual.") for name in load_file(folder / "base" / "model.safetensors"))
    return cls, running


@pytest.mark.parametrize(("base", "tuned"), [("base", "tuned-running"), ("base-running", "tuned"), ("base", "tuned")])
def test_all_of_the_language_model_is_compared_and_extracted(base, tuned, tmp_path):
    cls, right = qwen(tmp_path)
    folders = tmp_path / base, tmp_path / tuned
    run = deltaspec.analyze(*folders, tmp_path / "r")
    assert not run.skipped and not run.one_sided
    whole = deltaspec.analyze(tmp_path / "base", tmp_path / "tuned", tmp_path / "same")
    assert sorted(r.metrics["frobenius_norm"] for r in run.records) == sorted(
        r.metrics["frobenius_norm"] for r in whole.records
    )
    options = deltaspec.ExtractOptions(deltaspec.RankOptions(amounts=(64,)))
    (report,) = deltaspec.extract(*folders, tmp_path / "a", options=options).values()
    assert not report["not_carried"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
        found = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload().state_dict()
    assert found.keys() == right.keys()
    assert max(float((found[name] - right[name]).abs().max()) for name in right) < 1e-5
    checked = deltaspec.verify(*folders, tmp_path / "a")
    assert not checked.worse and not checked.missing


@pytest.mark.parametrize("base", ["base", "base-running"])
def test_a_body_without_its_head_pairs_whole(base, tmp_path):
    """Saved from the class without a head: one more prefix is missing."""
    qwen(tmp_path)
    run = deltaspec.analyze(tmp_path / base, tmp_path / "tuned-body", tmp_path / "r")
    assert {row["tensor"] for row in run.skipped} == {"lm_head.weight"}
    assert not run.one_sided
    pairs = deltaspec.analyze(tmp_path / "base", tmp_path / "tuned", tmp_path / "same").records
    assert {r.key.tensor.split(".")[-2] for r in run.records} == {r.key.tensor.split(".")[-2] for r in pairs} - {
        "lm_head"
    }
    assert len(run.records) == len(pairs) - 1
