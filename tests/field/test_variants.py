"""Several variants of one model in a folder: one rule says which is read, a note says so, and none are mixed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.io.weight_files import choose_weights
from tests.io.files import refusal, write_index
from tests.io.test_peft import write_adapter

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
OTHER = NAME.replace("to_q", "to_k")


def state(value, dtype=torch.float32):
    return {NAME: torch.full((4, 4), value, dtype=dtype), OTHER: torch.full((4, 4), value + 1, dtype=dtype)}


def put(folder, name, value, dtype=torch.float32):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state(value, dtype)
    save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)
    return folder


def shard(folder, pattern, value, *, index=""):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, tensor) in enumerate(state(value).items(), 1):
        save_file({name: tensor}, folder / pattern.format(number))
    if index:
        write_index(folder, {name: pattern.format(number) for number, name in enumerate(state(0), 1)}, index)


def value_of(source):
    assert set(source.tensors) == {NAME, OTHER}
    return float(read_tensor(source.tensors[NAME])[0, 0])


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("label", ["fp16", "bf16", "fp32", "ema", "non_ema", "anything-else"])
def test_the_name_without_a_label_is_read_and_the_others_named(tmp_path, stem, label):
    put(tmp_path, f"{stem}.{label}.safetensors", 2.0)
    alone = open_plain(tmp_path)
    assert value_of(alone) == 2.0
    assert not alone.notes
    put(tmp_path, f"{stem}.safetensors", 1.0)
    source = open_plain(tmp_path)
    assert value_of(source) == 1.0
    assert f"{stem}.safetensors is read, and not {stem}.{label}.safetensors" in source.notes[0]


def test_a_pickled_name_without_a_label_comes_before_a_labelled_one(tmp_path):
    put(tmp_path, "diffusion_pytorch_model.fp16.safetensors", 2.0)
    put(tmp_path, "diffusion_pytorch_model.bin", 1.0)
    source = open_plain(tmp_path)
    assert value_of(source) == 1.0
    assert "fp16" in source.notes[0]


def test_labels_alone_decide_nothing(tmp_path):
    put(tmp_path, "model.fp16.safetensors", 1.0)
    put(tmp_path, "model.non_ema.safetensors", 2.0)
    said = refusal(tmp_path)
    assert "model.fp16.safetensors" in said
    assert "model.non_ema.safetensors" in said
    assert value_of(open_plain(tmp_path / "model.non_ema.safetensors")) == 2.0


OLD = "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors", "diffusion_pytorch_model.safetensors.fp16.index.json"
NEW = "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"
PLAIN = "diffusion_pytorch_model-0000{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(("pattern", "index"), [OLD, NEW])
def test_shards_of_two_variants_are_not_mixed(tmp_path, pattern, index, indexed):
    shard(tmp_path, pattern, 2.0, index=index if indexed else "")
    assert value_of(open_plain(tmp_path)) == 2.0
    shard(tmp_path, PLAIN[0], 1.0, index=PLAIN[1] if indexed else "")
    source = open_plain(tmp_path)
    assert value_of(source) == 1.0
    assert "fp16" in source.notes[0]


def test_indexes_of_two_labels_are_refused_and_each_opens_by_its_path(tmp_path):
    shard(tmp_path, NEW[0], 1.0, index=NEW[1])
    shard(tmp_path, NEW[0].replace("fp16", "bf16"), 2.0, index=NEW[1].replace("fp16", "bf16"))
    assert "open one by its own path" in refusal(tmp_path)
    assert value_of(open_plain(tmp_path / NEW[1])) == 1.0


def test_one_file_labelled_beside_shards_without_a_label(tmp_path):
    """An older rule took any index first: the labelled one."""
    shard(tmp_path, NEW[0], 2.0, index=NEW[1])
    put(tmp_path, "diffusion_pytorch_model.safetensors", 1.0)
    assert value_of(open_plain(tmp_path)) == 1.0


@pytest.mark.parametrize(("names", "chosen"), [
    (["sd-v1.5.safetensors", "sd-v1.5.fp16.safetensors"], ("sd-v1.5.safetensors", "sd-v1.5.fp16.safetensors")),
    (["open_clip_pytorch_model.bin", "model.safetensors"], ("model.safetensors",)),
    (["layer.1.safetensors", "layer.2.safetensors"], ("layer.1.safetensors", "layer.2.safetensors")),
    (["model.part1.safetensors", "model.part2.safetensors"], ("model.part1.safetensors", "model.part2.safetensors")),
    (["consolidated.safetensors", "extra.safetensors"], ("consolidated.safetensors",)),
    (["pytorch_model.bin", "consolidated.safetensors"], ("pytorch_model.bin",)),
])  # fmt: skip
def test_which_files_are_taken(names, chosen):
    assert set(choose_weights(names)) == set(chosen)
    assert len(choose_weights(names)) == len(chosen)


@pytest.mark.parametrize(("pattern", "index"), [OLD, NEW])
def test_merge_writes_names_that_load_by_default(tmp_path, pattern, index):
    shard(tmp_path / "base", pattern, 1.0, index=index)
    put(tmp_path / "one", "diffusion_pytorch_model.fp16.safetensors", 1.0, torch.float16)
    path = NAME.removesuffix(".weight")
    tensors = {f"{path}.lora_A.weight": torch.ones(1, 4), f"{path}.lora_B.weight": torch.ones(4, 1)}
    write_adapter(tmp_path / "adapter", tensors, r=1, lora_alpha=1)
    for name in ("base", "one"):
        deltaspec.merge(tmp_path / name, [tmp_path / "adapter"], tmp_path / f"{name}-merged")
    merged = tmp_path / "base-merged"
    weights = {file.name for file in merged.iterdir()} - {"deltaspec.json"}
    assert weights == {PLAIN[0].format(1), PLAIN[0].format(2), PLAIN[1]}
    assert json.loads((merged / PLAIN[1]).read_text())["weight_map"][NAME] == PLAIN[0].format(1)
    assert float(load_file(merged / PLAIN[0].format(1))[NAME][0, 0]) == 2.0
    whole = load_file(tmp_path / "one-merged" / "diffusion_pytorch_model.safetensors")
    assert float(whole[NAME][0, 0]) == 2.0


def test_a_pipelines_root_names_its_components(tmp_path):
    put(tmp_path / "unet", "diffusion_pytorch_model.safetensors", 1.0)
    put(tmp_path / "text_encoder", "model.fp16.safetensors", 1.0)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert "open one of text_encoder, unet" in refusal(tmp_path)
    put(tmp_path, "pytorch_lora_weights.safetensors", 1.0)  # what lies at the top is not the pipeline
    assert "open one of text_encoder, unet" in refusal(tmp_path)


def test_a_single_file_beside_an_index_of_the_same_name_is_passed_over_aloud(tmp_path):
    shard(tmp_path, PLAIN[0], 1.0, index=PLAIN[1])
    assert not open_plain(tmp_path).notes
    put(tmp_path, "diffusion_pytorch_model.safetensors", 2.0)
    source = open_plain(tmp_path)
    assert value_of(source) == 1.0
    assert "not diffusion_pytorch_model.safetensors" in source.notes[0]


def test_what_was_passed_over_is_said_by_every_command(tmp_path):
    sides = [put(tmp_path / name, "model.safetensors", value) for name, value in (("base", 1.0), ("tuned", 3.0))]
    put(tmp_path / "base", "model.bf16.safetensors", 9.0)
    run = deltaspec.analyze(*sides, tmp_path / "run")
    assert sum("model.bf16.safetensors" in note for note in run.manifest["notes"]) == 1
    deltaspec.extract(*sides, tmp_path / "adapter")
    assert "model.bf16.safetensors" in (tmp_path / "adapter" / "deltaspec.json").read_text()
    report = deltaspec.merge(sides[0], [tmp_path / "adapter"], tmp_path / "merged")
    assert sum("model.bf16.safetensors" in note for note in report.notes) == 1
