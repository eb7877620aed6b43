"""Writes the checkpoints that these tests read, by hand or through the libraries that own the formats."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaspec.errors import CheckpointError
from deltaspec.io.open import open_plain

LAYOUTS = ("single", "sharded", "pickled", "nested", "legacy", "sharded_bin")


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def write_config(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def write_index(folder: Path, weight_map: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder / name


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], layout: str = "single") -> Path:
    """One checkpoint folder in the given layout; shards take the tensors in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "single":
        save_file(tensors, folder / "model.safetensors")
    elif layout == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif layout == "nested":
        torch.save({"epoch": 3, "model": {"state_dict": tensors, "step": torch.tensor(5)}}, folder / "last.pt")
    elif layout == "legacy":
        torch.save(tensors, folder / "weights.pth", _use_new_zipfile_serialization=False)
    else:
        stem, suffix, save = ("model", "safetensors", save_file)
        if layout == "sharded_bin":
            stem, suffix, save = ("pytorch_model", "bin", torch.save)
        names = [f"{stem}-0000{shard + 1}-of-00002.{suffix}" for shard in (0, 1)]
        weight_map = {name: names[number % 2] for number, name in enumerate(tensors)}
        for file in names:
            save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
        write_index(folder, weight_map, f"{stem}.{suffix}.index.json")
    return folder


def refusal(path: Path | str) -> str:
    """The sentence with which a path is refused; it must be one line, and say what to do."""
    with pytest.raises(CheckpointError) as caught:
        open_plain(path)
    said = str(caught.value)
    assert said.startswith("Cannot ")
    assert said.endswith(".")
    assert "\n" not in said
    return said
