"""A folder that lacks some of its shards is refused, whatever they are called and whether an index says so."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from deltaspec.cli.main import cli
from deltaspec.io.open import open_plain
from tests.io.files import refusal, write_index

NAMES = [
    "model-0000{}-of-00003.safetensors",
    "pytorch_model-0000{}-of-00003.bin",
    "diffusion_pytorch_model-0000{}-of-00003.safetensors",
    "diffusion_pytorch_model.fp16-0000{}-of-00003.safetensors",
    "diffusion_pytorch_model-0000{}-of-00003.fp16.safetensors",
    "consolidated-0000{}-of-00003.safetensors",
    "mine_0{}_of_03.safetensors",
    "mine-{}-of-3.pt",
]
TENSORS = {f"model.layers.{depth}.self_attn.q_proj.weight": torch.randn(4, 4) for depth in range(3)}


def write(folder, pattern, kept, *, first=1):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, tensor) in enumerate(TENSORS.items(), first):
        if number in kept:
            file = folder / pattern.format(number)
            save_file({name: tensor}, file) if file.suffix == ".safetensors" else torch.save({name: tensor}, file)
    return folder


@pytest.mark.parametrize("kept", [{1}, {2}, {3}, {1, 3}, {2, 3}])
@pytest.mark.parametrize("pattern", NAMES)
def test_what_the_numbers_promise_must_be_there(tmp_path, pattern, kept):
    said = refusal(write(tmp_path / "part", pattern, kept))
    assert f"'{pattern.format(min({1, 2, 3} - kept))}' is missing" in said
    assert set(open_plain(write(tmp_path / "all", pattern, {1, 2, 3})).tensors) == set(TENSORS)


@pytest.mark.parametrize("pattern", ["consolidated_ema.0{}-of-03.pth", "model{}-mp3.safetensors"])
def test_ranks_are_counted_from_zero(tmp_path, pattern):
    assert set(open_plain(write(tmp_path / "all", pattern, {0, 1, 2}, first=0)).tensors) == set(TENSORS)
    for kept in ({0}, {0, 2}, {1, 2}):
        assert "is missing" in refusal(write(tmp_path / str(kept), pattern, kept, first=0))


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("command", ["analyze", "extract"])
def test_either_side_stops_the_command(tmp_path, command, side):
    for name in ("base", "tuned"):
        write(tmp_path / name, NAMES[0], {1} if name == side else {1, 2, 3})
    arguments = [command, str(tmp_path / "base"), str(tmp_path / "tuned"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "'model-00002-of-00003.safetensors' is missing" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pattern", "index"), [
    ("model-0000{}-of-00003.safetensors", "model.safetensors.index.json"),
    ("model.fp16-0000{}-of-00003.safetensors", "model.safetensors.index.fp16.json"),
])  # fmt: skip
def test_an_index_says_so_too(tmp_path, pattern, index):
    folder = write(tmp_path / "m", pattern, {1, 2})
    write_index(folder, {name: pattern.format(number) for number, name in enumerate(TENSORS, 1)}, index)
    assert f"'{index}' names '{pattern.format(3)}', which is missing" in refusal(folder)


def test_a_shard_asked_for_by_its_own_path_is_said_to_be_one(tmp_path):
    source = open_plain(write(tmp_path / "m", NAMES[0], {1, 2}) / NAMES[0].format(2))
    assert len(source.tensors) == 1
    assert "one of 3 files" in source.notes[0]


def test_numbers_beyond_reason_promise_nothing(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / f"model-1-of-{10**30}.safetensors")
    assert set(open_plain(tmp_path).tensors) == {"a"}
