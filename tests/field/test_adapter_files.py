"""Plain LoRA of PEFT in files that are cut, named or called otherwise than PEFT does it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.io.open import open_plain, open_source
from deltaspec.types import AdapterIndex
from tests.families import write
from tests.io.files import refusal, write_index

A, B = torch.ones(2, 4), torch.ones(5, 2)
BASE = {"model.layers.0.self_attn.q_proj.weight": torch.eye(5, 4), "lm_head.weight": torch.ones(6, 4)}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def adapter(folder: Path, tensors: dict[str, torch.Tensor], name="adapter_model.safetensors", **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def merged(folder: Path | str, tmp_path: Path) -> np.ndarray:
    base = write(tmp_path / "base", BASE, {})
    deltaspec.merge(base, [folder], tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].numpy()


WANTED = np.eye(5, 4) + 2 * (B.numpy() @ A.numpy())
FACTORS_OF_Q = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


@pytest.mark.parametrize("index", [True, False])
def test_a_sharded_adapter(index, tmp_path):
    folder = adapter(tmp_path / "a", FACTORS_OF_Q)
    (folder / "adapter_model.safetensors").unlink()
    weight_map = {}
    for number, (key, tensor) in enumerate(FACTORS_OF_Q.items()):
        weight_map[key] = f"adapter_model-0000{number + 1}-of-00002.safetensors"
        save_file({key: tensor}, folder / weight_map[key])
    if index:
        write_index(folder, weight_map, "adapter_model.safetensors.index.json")
    source = open_plain(folder)
    assert isinstance(source, AdapterIndex)
    assert len(source.files) == 2
    assert np.array_equal(merged(folder, tmp_path), WANTED)
    (folder / weight_map[f"{Q}.lora_B.weight"]).unlink()
    assert "adapter_model-00002-of-00002.safetensors" in refusal(folder)


@pytest.mark.parametrize("index", [True, False])
def test_all_shards_of_an_adapter_that_is_not_plain_lora_are_its_files(index, tmp_path):
    folder = adapter(
        tmp_path / "a", {f"{Q}.lora_A.weight": A}, "adapter_model-00001-of-00002.safetensors", use_dora=True
    )
    adapter(folder, {f"{Q}.lora_B.weight": B}, "adapter_model-00002-of-00002.safetensors", use_dora=True)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index:
        write_index(folder, dict(zip(FACTORS_OF_Q, names, strict=True)), "adapter_model.safetensors.index.json")
    assert [file.name for file in open_source(folder).files] == names


@pytest.mark.parametrize("name", ["default", "sft", "my-adapter_2"])
def test_keys_that_carry_the_adapters_name(name, tmp_path):
    tensors = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in FACTORS_OF_Q.items()}
    tensors[f"base_model.model.lm_head.modules_to_save.{name}.weight"] = torch.full((6, 4), 3.0)
    assert np.array_equal(merged(adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"]), tmp_path), WANTED)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].unique().tolist() == [3.0]


def test_an_embeddings_factors_that_carry_the_adapters_name(tmp_path):
    embedding = "base_model.model.model.embed_tokens"
    keys = {
        f"{embedding}.lora_embedding_A.sft": torch.ones(2, 7),
        f"{embedding}.lora_embedding_B.sft": torch.ones(3, 2),
    }
    source = open_plain(adapter(tmp_path / "a", keys))
    assert isinstance(source, AdapterIndex)
    assert source.modules["model.embed_tokens"].embedding


def test_keys_of_several_adapters(tmp_path):
    tensors = {f"{Q}.lora_{side}.{name}.weight": t for side, t in (("A", A), ("B", B)) for name in ("sft", "dpo")}
    assert "several adapters (dpo, sft)" in refusal(adapter(tmp_path / "a", tensors))


def test_weights_under_another_name_have_their_config_beside_them(tmp_path):
    folder = adapter(tmp_path / "a", FACTORS_OF_Q, name="pytorch_lora_weights.safetensors")
    assert np.array_equal(merged(folder / "pytorch_lora_weights.safetensors", tmp_path), WANTED)


def test_a_config_under_another_name_is_named(tmp_path):
    folder = adapter(tmp_path / "a", FACTORS_OF_Q)
    (folder / "adapter_config.json").rename(folder / "sft_adapter_config.json")
    assert "rename 'sft_adapter_config.json'" in refusal(folder)
