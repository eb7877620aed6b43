"""Every dtype in every layout gives back the numbers that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaspec.io.matrix import open_matrix, read_tensor
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint, MatrixSource, View
from tests.io.files import LAYOUTS, write_checkpoint, write_config

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
}


def opened(folder: Path) -> Checkpoint:
    source = open_plain(folder)
    assert isinstance(source, Checkpoint)
    return source


PAIRS = [(d, layout) for d in DTYPES for layout in LAYOUTS if not (layout == "legacy" and d.startswith("F8"))]


@pytest.mark.parametrize(("dtype", "layout"), PAIRS)  # torch cannot write fp8 in its legacy format
def test_every_dtype_in_every_layout(tmp_path: Path, dtype: str, layout: str) -> None:
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(*shape) * 9).to(DTYPES[dtype]) for name, shape in (("a", (5, 7)), ("b", (3,)), ("c", (1, 4)))
    }
    source = opened(write_checkpoint(tmp_path, tensors, layout))
    assert set(source.tensors) == set(tensors)
    for name, tensor in tensors.items():
        spec = source.tensors[name]
        assert (spec.dtype, spec.shape) == (dtype, tuple(tensor.shape))
        read = read_tensor(spec)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.to(torch.float64), tensor.to(torch.float64))
    matrix = open_matrix(MatrixSource(source.tensors["a"], View((5, 7))))
    assert matrix.dtype == dtype
    assert torch.equal(matrix.rows(1, 4).double(), tensors["a"][1:4].double())
    assert torch.equal(matrix.columns(2, 6).double(), tensors["a"][:, 2:6].double())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_and_its_folder_are_the_same(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {"w": torch.eye(3)}, "single" if name.startswith("model") else "pickled")
    write_config(tmp_path, model_type="llama")
    file, folder = opened(tmp_path / name), opened(tmp_path)
    assert file.tensors == folder.tensors
    assert file.config == folder.config == {"model_type": "llama"}
    assert file.files == (tmp_path / name,)


def test_an_index_file_opens_its_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2), "b": torch.ones(3)}, "sharded")
    source = opened(tmp_path / "model.safetensors.index.json")
    assert {file.name for file in source.files} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert source.root == tmp_path


def test_an_index_wins_over_stray_files_and_safetensors_over_pickles(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2), "b": torch.ones(3)}, "sharded")
    write_checkpoint(tmp_path, {"stray": torch.eye(2)}, "single")
    write_checkpoint(tmp_path, {"pickled": torch.eye(2)}, "pickled")
    assert set(opened(tmp_path).tensors) == {"a", "b"}


def test_several_files_without_an_index_are_taken_together(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2), "b": torch.ones(3)}, "sharded")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert set(opened(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "consolidated.safetensors"])
def test_other_customary_names(tmp_path: Path, file: str) -> None:
    write_checkpoint(tmp_path, {"a": torch.eye(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    assert opened(tmp_path).files == (tmp_path / file,)


def test_training_state_is_not_taken_for_weights(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(2)}, tmp_path / "model.pt")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"not even a pickle")
    assert set(opened(tmp_path).tensors) == {"w"}


def test_zero_sized_tensors_scalars_and_nan_are_read(tmp_path: Path) -> None:
    tensors = {"none": torch.zeros(0, 4), "one": torch.tensor(2.0), "nan": torch.tensor([[float("nan"), float("inf")]])}
    source = opened(write_checkpoint(tmp_path, tensors))
    assert read_tensor(source.tensors["one"]).item() == 2.0
    assert open_matrix(MatrixSource(source.tensors["none"], View((0, 4)))).rows(0, 0).shape == (0, 4)
    row = open_matrix(MatrixSource(source.tensors["nan"], View((1, 2)))).rows(0, 1)
    assert row[0, 0].isnan() and row[0, 1].isinf()
