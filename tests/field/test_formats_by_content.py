"""Files are what they hold, whatever they are called; what cannot be read is named by its first bytes."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import deltaspec
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint
from tests.io.files import refusal, write_config, write_index

W = torch.arange(12.0).reshape(3, 4)
NAMES = (
    "last.ckpt",
    "model.pth.tar",
    "weights.model",
    "weights",
    "epoch=3-step=9.ckpt",
    "x.safetensors",
    "x.bin",
    "x.dat",
)


def pickled(legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save({"layers.0.q_proj.weight": W}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


WEIGHTS = {
    "safetensors": save({"layers.0.q_proj.weight": W}),
    "pickled": pickled(),
    "legacy": pickled(legacy=True),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", WEIGHTS)
def test_weights_are_read_under_any_name(form, name, tmp_path):
    (tmp_path / name).write_bytes(WEIGHTS[form])
    source = open_plain(tmp_path / name)
    assert isinstance(source, Checkpoint)
    assert torch.equal(read_tensor(source.tensors["layers.0.q_proj.weight"]), W)
    before = fingerprint(source)
    (tmp_path / name).write_bytes(WEIGHTS[form][:-8] + bytes(8))
    assert form == "legacy" or fingerprint(source) != before


@pytest.mark.parametrize("name", ["last.ckpt", "model.pth.tar"])
def test_a_folder_of_such_files(name, tmp_path):
    (tmp_path / name).write_bytes(WEIGHTS["pickled"])
    write_config(tmp_path, model_type="x")
    assert set(open_plain(tmp_path).tensors) == {"layers.0.q_proj.weight"}


def test_a_training_checkpoint_beside_weights_is_not_mixed_with_them(tmp_path):
    torch.save({"w": W}, tmp_path / "weights.pt")
    torch.save({"state_dict": {"model.w": W}, "epoch": 3}, tmp_path / "last.ckpt")
    assert set(open_plain(tmp_path).tensors) == {"w"}


def test_a_folder_whose_names_tell_nothing_names_the_file(tmp_path):
    (tmp_path / "weights").write_bytes(WEIGHTS["safetensors"])
    (tmp_path / "notes.txt").write_text("text")
    assert "by 'weights'; open it by its path" in refusal(tmp_path)


def test_shards_and_an_index_of_pickles_called_safetensors(tmp_path):
    for number in (1, 2):
        torch.save({f"w{number}": W + number}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    write_index(tmp_path, {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)})
    source = open_plain(tmp_path)
    assert torch.equal(read_tensor(source.tensors["w2"]), W + 2)


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x80\x02N.")
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_config.yaml"), io.BytesIO(b""))
    return stream.getvalue()


def torchscript() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(4, 3), torch.ones(1, 4)), stream)
    return stream.getvalue()


def exported() -> bytes:
    stream = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(4, 3), (torch.ones(1, 4),)), stream)
    return stream.getvalue()


def arrays(**found: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **found) if len(found) > 1 else np.save(stream, found["one"])
    return stream.getvalue()


FOREIGN = {
    "GGUF": lambda: b"GGUF\x03\x00\x00\x00" + bytes(64),
    "GGML": lambda: b"lmgg" + bytes(64),
    "TorchScript": torchscript,
    "torch.export": exported,
    "ONNX": lambda: b"\x08\x09\x12\x07pytorch\x1a\x052.1.0" + bytes(64),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(64),
    "NumPy array": lambda: arrays(one=np.ones(3)),
    "NumPy archive": lambda: arrays(a=np.ones(3), b=np.ones(3)),
    "Keras": lambda: zipped("metadata.json", "config.json", "model.weights.h5"),
    "TensorFlow Lite": lambda: b"\x20\x00\x00\x00TFL3" + bytes(64),
    "tar archive": tarred,
    "packed archive": lambda: b"\x1f\x8b\x08" + bytes(64),
    "unpack it": lambda: zipped("model/model.safetensors", "model/config.json"),
    "git lfs pull": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "web page": lambda: b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    "XML": lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
}  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.ckpt", "weights"])
@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_read_is_named_by_its_content(what, name, tmp_path):
    (tmp_path / name).write_bytes(FOREIGN[what]())
    assert what in refusal(tmp_path / name)
    if name != "weights":
        assert what in refusal(tmp_path)


def test_a_pickle_that_torch_did_not_write_is_never_run(tmp_path):
    (tmp_path / "weights").write_bytes(pickle.dumps({"w": [1.0, 2.0]}, protocol=2))
    assert "Cannot read" in refusal(tmp_path / "weights")


def test_a_text_file_stays_what_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 1}))
    for name in ("notes.txt", "vocab.json"):
        assert "it is none of .safetensors" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["last.ckpt", "model.pth.tar", "weights"])
def test_a_merge_writes_safetensors_under_a_name_that_says_so(name, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / name).write_bytes(WEIGHTS["pickled"])
    write_config(base, model_type="x")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(3, 1)}
    keys = {f"base_model.model.layers.0.q_proj.{side}.weight": factor for side, factor in factors.items()}
    save_file(keys, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    deltaspec.merge(base / name, [adapter], tmp_path / "out")
    written = f"{name.split('.')[0]}.safetensors"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {written, "config.json", "deltaspec.json"}
    assert torch.equal(load_file(tmp_path / "out" / written)["layers.0.q_proj.weight"], W + 1)
