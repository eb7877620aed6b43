"""Pickled checkpoints: wrappers, shared memory, odd tensors; what is hostile is in tests/faults."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from deltaspec.errors import CheckpointError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint


def opened(path: Path) -> Checkpoint:
    source = open_plain(path)
    assert isinstance(source, Checkpoint)
    return source


W = torch.arange(6.0).reshape(2, 3)
WRAPPED = {
    "bare": {"w": W},
    "ordered": OrderedDict(w=W),
    "state_dict": {"state_dict": {"w": W}, "epoch": 3, "loss": torch.tensor(0.5)},
    "model": {"model": {"w": W}, "optimizer": {"state": {0: {"exp_avg": W}}}},
    "model_state_dict": {"model_state_dict": {"w": W}},
    "module": {"module": {"w": W}, "dp_world_size": 1},
    "params": {"params": OrderedDict(w=W)},
    "deep": {"model": {"module": {"state_dict": {"w": W}}}},
    "not tensors": {"w": W, "args": {"lr": 0.1}, "names": ["a"], 7: W, "model": None},
    "parameter": {"w": torch.nn.Parameter(W)},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers(tmp_path: Path, case: str, legacy: bool) -> None:
    torch.save(WRAPPED[case], tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    source = opened(tmp_path / "x.pt")
    assert set(source.tensors) == {"w"}
    read = read_tensor(source.tensors["w"])
    assert torch.equal(read, W)
    assert not read.requires_grad


@pytest.mark.parametrize("legacy", [False, True])
def test_names_that_share_memory_are_aliases(tmp_path: Path, legacy: bool) -> None:
    tensors = {"embed": W, "lm_head": W, "copy": W.clone(), "turned": W.t(), "row": W[:1], "none": W[:0], "zero": W[:0]}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    source = opened(tmp_path / "x.pt")
    assert source.aliases == {"lm_head": "embed"}
    assert set(source.tensors) == set(tensors) - {"lm_head"}
    for name, spec in source.tensors.items():
        assert torch.equal(read_tensor(spec), tensors[name])


def test_names_that_safetensors_left_out_as_shared_are_aliases(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    source = opened(tmp_path)
    assert len(source.tensors) == len(source.aliases) == 1
    assert {*source.tensors, *source.aliases} == {"embed.weight", "head.weight"}
    assert set(source.aliases.values()) == set(source.tensors)


def test_a_legacy_file_that_changes_is_read_again(tmp_path: Path) -> None:
    for value in (W, torch.ones(40)):
        torch.save({"w": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        assert torch.equal(read_tensor(opened(tmp_path / "x.pt").tensors["w"]), value)


def test_a_file_that_changed_after_opening_is_not_read(tmp_path: Path) -> None:
    torch.save({"w": W}, tmp_path / "x.pt")
    spec = opened(tmp_path / "x.pt").tensors["w"]
    torch.save({"w": W.t().contiguous()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="has changed since"):
        read_tensor(spec)
    torch.save({"v": W}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'w' in .*has changed since"):
        read_tensor(spec)


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.zeros(2, 2, device="meta")])
def test_tensors_that_are_not_plain_numbers(tmp_path: Path, odd: torch.Tensor) -> None:
    torch.save({"ok": W, "odd": odd}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"Cannot use 'odd' in .*x\.pt"):
        opened(tmp_path / "x.pt")
