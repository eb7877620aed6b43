"""Damaged and hostile files: each one gives one sentence that names it, and none is believed."""

from __future__ import annotations

import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltaspec.errors import CheckpointError
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint
from tests.io.files import refusal, write_checkpoint, write_index, write_raw

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": F32}, bytes(4)),
        ({"a": F32}, bytes(12)),
        ({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)),
        ({"a": {**F32, "data_offsets": [0, 2**60]}}, bytes(8)),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
        ({"a": F32, "b": F32}, bytes(8)),
        ({"a": {**F32, "shape": [3]}}, bytes(8)),
        ({"a": {**F32, "shape": [2**40, 2**40]}}, bytes(8)),
        ({"a": {**F32, "shape": [-2]}}, bytes(8)),
        ({"a": {**F32, "dtype": "Q4"}}, bytes(8)),
        ({"a": [1]}, bytes(8)),
        ([], b""),
        (b"no json", b""),
        (b"[" * 5000, b""),
        (b"\xff\xfe{}", b""),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, data: bytes) -> None:
    said = refusal(write_raw(tmp_path / "model.safetensors", header, data))
    assert "model.safetensors" in said
    assert "download it again" in said


@pytest.mark.parametrize(
    "content", [b"", b"\x00", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 9) + b"{}", b"<html>not found</html>"]
)
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "download it again" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path)


def test_a_name_twice_in_one_header(tmp_path: Path) -> None:
    twice = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    assert "names 'a' twice" in refusal(write_raw(tmp_path / "x.safetensors", twice, bytes(8)))


@pytest.mark.parametrize("layout", ["sharded", "sharded_bin"])
def test_a_name_in_two_shards(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2), "b": torch.eye(2)}, layout)
    first, second = sorted(file for file in tmp_path.iterdir() if "-of-" in file.name)
    second.write_bytes(first.read_bytes())
    said = refusal(tmp_path)
    assert "'a'" in said
    assert first.name in said
    assert second.name in said


@pytest.mark.parametrize("layout", ["single", "sharded", "pickled", "nested", "legacy", "sharded_bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, layout: str, share: float) -> None:
    write_checkpoint(tmp_path, {"a": torch.randn(64, 64), "b": torch.randn(64)}, layout)
    file = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert file.name in refusal(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    source = open_plain(write_checkpoint(tmp_path, {"a": torch.randn(64, 64)}))
    assert isinstance(source, Checkpoint)
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"'a' from '.*model\.safetensors'"):
        read_tensor(source.tensors["a"])


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "\\\\host\\x", "", "a\0b", "//x"]
)
def test_an_index_that_points_outside_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = write_index(folder, {"w": name})
    for path in (folder, index):
        assert "outside its own folder" in refusal(path)


def test_an_index_that_follows_links_as_hub_caches_do(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.eye(2)}, tmp_path / "blobs" / "0a1b")
    (tmp_path / "snapshot" / "x.safetensors").symlink_to(Path("..", "blobs", "0a1b"))
    write_index(tmp_path / "snapshot", {"w": "x.safetensors"})
    assert open_plain(tmp_path / "snapshot")


def test_an_index_that_does_not_know_its_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2), "b": torch.eye(2)}, "sharded")
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    write_index(tmp_path, {"a": first, "b": first})
    assert "Cannot find 'b'" in refusal(tmp_path)
    write_index(tmp_path, {"a": first, "b": second, "c": second})
    assert "Cannot find 'c'" in refusal(tmp_path)
    write_index(tmp_path, {"a": first, "b": "model-00003-of-00002.safetensors"})
    assert "'model-00003-of-00002.safetensors', which is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[" * 99999, "\udcff"],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_is_none(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\udcff"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2)})
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in refusal(tmp_path)


def test_a_shard_that_the_others_promise_is_missing(tmp_path: Path) -> None:
    for number in (1, 3):
        save_file({f"w{number}": torch.eye(2)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    assert "'model-00002-of-00003.safetensors' is missing" in refusal(tmp_path)


@pytest.mark.parametrize("layout", ["single", "pickled", "legacy"])
def test_an_empty_checkpoint(tmp_path: Path, layout: str) -> None:
    assert "holds no tensors" in refusal(write_checkpoint(tmp_path, {}, layout))


class Code:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 4"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, form: str) -> None:
    trap, file = tmp_path / "trap", tmp_path / "pytorch_model.bin"
    content = {"w": torch.eye(2), "x": Code(trap)}
    if form.startswith("pickle"):
        file.write_bytes(pickle.dumps({"x": Code(trap)}, protocol=4 if "4" in form else 2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    said = refusal(tmp_path)
    assert "code" in said
    assert "deltaspec never runs" in said
    assert "safetensors" in said
    assert not trap.exists()


def test_a_pickle_that_contains_itself(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"epoch": 1}
    endless["state_dict"] = endless
    endless["model"] = {"module": endless}
    torch.save(endless, tmp_path / "x.pt")
    assert "holds no tensors" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [3, {"a": [1]}, {"a": {}}, [[]]])
def test_pickles_without_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "holds no tensors" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [[torch.eye(2)], torch.eye(2), {1: torch.eye(2)}, {"a": [torch.eye(2)]}])
def test_pickles_without_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "holds tensors without names" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("layout", ["single", "nested", "legacy"])
def test_flipped_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path, layout: str) -> None:
    folder = write_checkpoint(tmp_path, {"a": torch.randn(4, 5), "b": torch.randn(3)}, layout)
    (file,) = folder.iterdir()
    original, generator = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(original)
        for _ in range(generator.choice([1, 2, 5])):
            damaged[generator.randrange(min(len(damaged), 900))] = generator.randrange(256)
        file.write_bytes(damaged)
        try:
            source = open_plain(file)
            fingerprint(source)
            assert isinstance(source, Checkpoint)
            for spec in source.tensors.values():
                read_tensor(spec)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_a_shape_beyond_what_is_stored(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(2**20, 2**20)}, tmp_path / "x.pt")
    assert "needs more bytes than the file has" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 and nothing more", bytes(4096)])
def test_files_that_are_no_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert "x.pth" in refusal(tmp_path / "x.pth")
