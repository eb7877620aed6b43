"""Fingerprints: the same for a copy, another one for changed numbers, at the cost of samples."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from deltaspec.errors import CheckpointError
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.open import open_plain
from tests.io.files import LAYOUTS, write_checkpoint, write_config


def tensors(changed: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values = {"big": torch.randn(300, 300), "middle": torch.randn(40, 40), "small": torch.randn(3)}
    return {name: value * (1 + 1e-3 * (name == changed)) for name, value in values.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_change_of_any_tensor_shows(tmp_path: Path, layout: str) -> None:
    original = fingerprint(open_plain(write_checkpoint(tmp_path / "a", tensors(), layout)))
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in original.values())
    for name in tensors():
        changed = fingerprint(open_plain(write_checkpoint(tmp_path / name, tensors(changed=name), layout)))
        assert changed.keys() == original.keys()
        assert changed != original


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_has_the_same(tmp_path: Path, layout: str) -> None:
    folder = write_checkpoint(tmp_path / "a", tensors(), layout)
    write_config(folder, model_type="llama")
    original = fingerprint(open_plain(folder))
    shutil.copytree(folder, tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        os.utime(file, (1, 1))
    assert fingerprint(open_plain(tmp_path / "b")) == original
    write_config(tmp_path / "b", model_type="gpt2")
    assert {name for name, value in fingerprint(open_plain(tmp_path / "b")).items() if original[name] != value} == {
        "config.json"
    }


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    source = open_plain(write_checkpoint(tmp_path, tensors(), "pickled"))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        fingerprint(source)
