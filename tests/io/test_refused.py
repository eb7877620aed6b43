"""What is not there, or in a format that is not read: refused by name, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.io.files import refusal, write_checkpoint, write_config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.Q4_K_M.gguf", "GGUF"),
        ("__0_0.distcp", "FSDP or DCP"),
        (".metadata", "FSDP or DCP"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
    ],
)
def test_formats_that_are_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(bytes(64))
    for path in (tmp_path, tmp_path / name):
        said = refusal(path)
        assert words in said
        assert "safetensors" in said


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    assert "found nothing" in refusal(tmp_path)
    write_config(tmp_path, model_type="llama")
    assert "found config.json" in refusal(tmp_path)
    write_checkpoint(tmp_path / "unet", {"a": torch.eye(2)})
    assert "open one of unet" in refusal(tmp_path)


@pytest.mark.parametrize(
    "ref", ["./missing", "missing", "a/b/c", "../x/y", "~/none-of-that-name", "x/model.safetensors", "", "a\0b"]
)
def test_a_path_that_is_not_there(ref: str) -> None:
    assert "no such file or folder" in refusal(ref)


@pytest.mark.parametrize("ref", ["~nobody-of-that-name/x", "x" * 300])
def test_a_path_that_cannot_even_be_looked_for(ref: str) -> None:
    assert ref in refusal(ref)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    assert "it is none of .safetensors" in refusal(tmp_path / "notes.txt")
