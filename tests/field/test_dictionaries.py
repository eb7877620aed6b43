"""Several dictionaries in one pickled file: the one that is meant is read, none vanishes without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint
from tests.field.meta_models import hugging_face, meta, write_meta
from tests.io.files import refusal, write_config

W = torch.arange(12.0).reshape(3, 4)
SD = {"a.weight": W, "b.weight": W + 1}
AVERAGE = {name: tensor + 9 for name, tensor in SD.items()}
OPTIMIZER = {"state": {0: {"exp_avg": W}}, "param_groups": [{"lr": 0.1}]}


def saved(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def read(path: Path | str) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    source = open_plain(path)
    assert isinstance(source, Checkpoint)
    return {name: read_tensor(spec) for name, spec in source.tensors.items()}, source.notes


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("content", [
    {"model": SD, "optimizer": OPTIMIZER, "lr_scheduler": {"last": W}, "epoch": 3},
    {"state_dict": SD, "optimizer_states": [OPTIMIZER], "callbacks": {"best": {"score": W}}, "loss": torch.tensor(0.5)},
    {"module": SD, "cuda_rng_state": torch.zeros(99, dtype=torch.uint8), "torch_rng_state": W, "d_optim": OPTIMIZER},
    {"generator": SD, "opt_g": OPTIMIZER, "scaler": {"scale": W}, "step": torch.tensor([4])},
    {"net": {"core": {"state_dict": SD}}, "amp": {"loss_scaler0": {"x": W}}, "random_states": [W, W]},
    {"model": SD, "state_dict": SD},
    [SD],
])  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_one_of_them_holds_weights(content, legacy, tmp_path):
    found, notes = read(saved(tmp_path / "x.pt", content, legacy=legacy))
    assert same(found, SD)
    assert notes == ()


@pytest.mark.parametrize("name", ["model_ema", "ema", "ema_model", "state_dict_ema", "shadow", "swa_model"])
def test_an_average_is_left_out_with_a_note_and_can_be_asked_for(name, tmp_path):
    file = saved(tmp_path / "x.pt", {"model": SD, name: AVERAGE})
    found, notes = read(file)
    assert same(found, SD)
    assert len(notes) == 1
    assert f"x.pt::{name}" in notes[0]
    assert same(read(f"{file}::{name}")[0], AVERAGE)
    assert same(read(saved(tmp_path / "alone.pt", {name: AVERAGE, "optimizer": OPTIMIZER}))[0], AVERAGE)


SEVERAL = {
    "components": ({"unet": SD, "text_encoder": {"c": W}}, ["unet", "text_encoder"]),
    "a head": ({"model": SD, "classifier_head": {"fc.weight": W}}, ["model", "classifier_head"]),
    "dino": ({"teacher": SD, "student": AVERAGE, "epoch": 3}, ["teacher", "student"]),
    "the top": ({**SD, "module": {"fc.weight": W}}, [".", "module"]),
    "in a list": ({"models": [{"c": W}, {"c": W + 1}]}, ["models.0", "models.1"]),
    "under numbers": ({"state": {0: SD, 1: AVERAGE}}, ["state.0", "state.1"]),
    "Megatron": (
        {"model": {"language_model": {"embedding": {"word": {"weight": W}}, "encoder": SD}}},
        ["model.language_model.embedding.word", "model.language_model.encoder"],
    ),
    "a criterion": ({"model": SD, "criterion": {"centers": W}}, ["model", "criterion"]),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_are_refused_by_their_names_and_each_can_be_named(case, tmp_path):
    content, names = SEVERAL[case]
    file = saved(tmp_path / "x.pt", content)
    said = refusal(file)
    assert all(f"'{name}'" in said for name in names)
    assert f"'x.pt::{names[0]}'" in said
    for name in names:
        inner: Any = content
        for key in () if name == "." else name.split("."):
            inner = inner[int(key) if key.isdecimal() else key]
        wanted = {key: tensor for key, tensor in inner.items() if isinstance(tensor, torch.Tensor)}
        assert same(read(f"{file}::{name}")[0], wanted)
    assert "'nowhere'" in refusal(f"{file}::nowhere")


def test_the_beginning_of_a_path_is_enough_where_one_fits(tmp_path):
    file = saved(tmp_path / "x.pt", {"unet": {"state_dict": SD}, "vae": {"a": {"c": W}, "b": {"d": W}}})
    assert same(read(f"{file}::unet")[0], SD)
    said = refusal(f"{file}::vae")
    assert "'vae.a'" in said
    assert "'vae.b'" in said


def test_tensors_without_names_are_told(tmp_path):
    found, notes = read(saved(tmp_path / "x.pt", {"model": SD, "centers": [W, W], 7: W}))
    assert same(found, SD)
    assert len(notes) == 1
    assert "'centers'" in notes[0]
    assert "'.'" in notes[0]


def test_names_with_colons_that_exist_are_paths(tmp_path):
    assert same(read(saved(tmp_path / "x.pt::unet", SD))[0], SD)
    saved(tmp_path / "x.pt", {"unet": AVERAGE, "vae": SD})
    assert same(read(tmp_path / "x.pt::unet")[0], SD)


def test_safetensors_have_no_dictionaries_inside(tmp_path):
    save_file(SD, tmp_path / "x.safetensors")
    assert "one dictionary" in refusal(f"{tmp_path / 'x.safetensors'}::unet")


def test_the_same_file_is_another_source_under_another_name(tmp_path):
    file = saved(tmp_path / "x.pt", {"unet": SD, "vae": AVERAGE})
    first, second = (fingerprint(open_plain(f"{file}::{name}")) for name in ("unet", "vae"))
    assert first.keys() == {"x.pt::unet"}
    assert second.keys() == {"x.pt::vae"}


def test_analyze_and_merge_take_the_one_that_is_named(tmp_path):
    base = saved(tmp_path / "base.pt", {"unet": {"layers.0.q_proj.weight": W}, "vae": {"c": W}})
    tuned = saved(tmp_path / "tuned.pt", {"model": {"layers.0.q_proj.weight": W + 2}, "ema": {"c.weight": W}})
    run = deltaspec.analyze(f"{base}::unet", tuned, tmp_path / "run")
    assert run.records[0].metrics["frobenius_norm"] == pytest.approx(2 * np.sqrt(12), rel=1e-12)
    assert any("tuned.pt::ema" in str(note) for note in run.manifest["notes"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(3, 1)}
    keys = {f"base_model.model.layers.0.q_proj.{name}.weight": factor for name, factor in factors.items()}
    save_file(keys, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (tmp_path / "neighbour.txt").write_text("of another model")
    deltaspec.merge(f"{base}::unet", [adapter], tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "base.safetensors")["layers.0.q_proj.weight"], W + 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"base.safetensors", "deltaspec.json"}
    write_config(tmp_path, model_type="x")
    both = saved(tmp_path / "avg.pt", {"a": {"layers.0.q_proj.weight": W}, "ema": SD})
    report = deltaspec.merge(both, [adapter], tmp_path / "two")
    assert any("avg.pt::ema" in note for note in report.notes)


def test_wrappers_come_off_the_names_of_the_dictionary_that_is_named(tmp_path):
    wrapped = {f"module._fsdp_wrapped_module.{name}": tensor for name, tensor in SD.items()}
    path = saved(tmp_path / "last.ckpt", {"student": wrapped, "teacher": AVERAGE})
    assert same(read(f"{path}::student")[0], SD)
    assert same(read(f"{path}::teacher")[0], AVERAGE)


def test_one_dictionary_of_a_file_in_metas_layout(tmp_path):
    state = hugging_face(0)
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    folder = write_meta(tmp_path / "m", meta(state), 1)
    path = saved(folder / "consolidated.00.pth", {"model": meta(state), "ema": meta(doubled)})
    found, notes = read(folder)
    assert same(found, state)
    assert any("also holds 'ema'" in note for note in notes)
    assert any("in Meta's layout" in note for note in notes)
    assert same(read(f"{path}::ema")[0], doubled)
