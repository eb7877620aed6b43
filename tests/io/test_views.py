"""Views against NumPy, written from the reading order that types.py documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deltaspec.errors import CheckpointError
from deltaspec.io.matrix import open_matrix
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint, MatrixSource, TensorSpec, View
from tests.io.files import write_checkpoint

CASES = {
    "whole": ((6, 4), View((6, 4)), lambda w: w),
    "column": ((6, 1), View((6, 1)), lambda w: w),
    "Conv1D": ((4, 6), View((6, 4), transposed=True), lambda w: w.T),
    "expert": ((3, 6, 4), View((6, 4), expert=2), lambda w: w[2]),
    "expert transposed": ((3, 4, 6), View((6, 4), expert=1, transposed=True), lambda w: w[1].T),
    "fused rows": ((12, 4), View((4, 4), start=4, stop=8), lambda w: w[4:8]),
    "last rows": ((12, 4), View((8, 4), start=4), lambda w: w[4:]),
    "fused columns of Conv1D": ((4, 12), View((4, 4), transposed=True, start=8, stop=12), lambda w: w[:, 8:12].T),
    "interleaved": (
        (18, 4),
        View((6, 4), groups=3, start=2, stop=4),
        lambda w: np.concatenate([w[2:4], w[8:10], w[14:16]]),
    ),
    "interleaved transposed": (
        (4, 6),
        View((2, 4), groups=2, start=1, stop=2, transposed=True),
        lambda w: np.stack([w[:, 1], w[:, 4]]),
    ),
    "expert rows": ((2, 6, 4), View((3, 4), expert=1, start=3, stop=6), lambda w: w[1, 3:6]),
    "kernel": ((6, 2, 3, 3), View((6, 18)), lambda w: w.reshape(6, 18)),
    "kernel 1-D": ((6, 2, 5), View((6, 10)), lambda w: w.reshape(6, 10)),
    "transposed kernel": ((2, 3, 2, 2), View((12, 2), transposed=True), lambda w: w.reshape(2, 12).T),
}


def stored(folder: Path, tensor: torch.Tensor, layout: str = "single") -> TensorSpec:
    source = open_plain(write_checkpoint(folder, {"w": tensor}, layout))
    assert isinstance(source, Checkpoint)
    return source.tensors["w"]


@pytest.mark.parametrize("layout", ["single", "pickled"])
@pytest.mark.parametrize("case", CASES)
def test_views(tmp_path: Path, case: str, layout: str) -> None:
    shape, view, expected = CASES[case]
    values = np.random.default_rng(0).standard_normal(shape)
    matrix = open_matrix(MatrixSource(stored(tmp_path, torch.from_numpy(values), layout), view))
    wanted = expected(values)
    assert matrix.shape == wanted.shape
    assert np.array_equal(matrix.rows(0, view.shape[0]).numpy(), wanted)
    for start in range(view.shape[0]):
        assert np.array_equal(matrix.rows(start, start + 2).numpy(), wanted[start : start + 2])
    for start in range(view.shape[1]):
        assert np.array_equal(matrix.columns(start, start + 3).numpy(), wanted[:, start : start + 3])


def test_contiguous_rows_are_views_of_the_file(tmp_path: Path) -> None:
    matrix = open_matrix(MatrixSource(stored(tmp_path, torch.randn(8, 4)), View((4, 4), start=2, stop=6)))
    assert matrix.rows(0, 2).data_ptr() == matrix.rows(0, 4).data_ptr()
    assert matrix.rows(1, 2).data_ptr() - matrix.rows(0, 2).data_ptr() == 16


def test_channels_last_kernels_are_flattened_by_meaning_not_by_memory(tmp_path: Path) -> None:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    matrix = open_matrix(MatrixSource(stored(tmp_path, kernel, "pickled"), View((4, 12))))
    assert torch.equal(matrix.rows(0, 4), kernel.contiguous().reshape(4, 12))


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((6, 4), View((4, 6))),
        ((6, 4), View((6, 4), expert=0)),
        ((3, 6, 4), View((6, 4), expert=3)),
        ((6,), View((6, 1))),
        ((7, 4), View((2, 4), groups=3, start=0, stop=1)),
        ((6, 4), View((6, 4), start=2, stop=8)),
        ((6, 4), View((2, 4), groups=3, start=1, stop=0)),
    ],
)
def test_a_view_that_does_not_fit_names_file_and_tensor(tmp_path: Path, shape: tuple[int, ...], view: View) -> None:
    spec = stored(tmp_path, torch.zeros(shape))
    with pytest.raises(CheckpointError, match=r"'w' in '.*model\.safetensors' as a matrix") as error:
        open_matrix(MatrixSource(spec, view))
    assert str(shape) in str(error.value)
