"""fp8 with scales in every shape against a loop over elements, and refusals by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deltaspec.errors import CheckpointError
from deltaspec.io.matrix import open_matrix
from deltaspec.io.open import open_plain
from deltaspec.io.scales import dequantise
from deltaspec.types import Checkpoint, MatrixSource, View
from tests.io.files import write_checkpoint, write_config

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def by_element(stored: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The definition, one element after the other."""
    out = np.empty(stored.shape)
    for i in range(stored.shape[0]):
        for j in range(stored.shape[1]):
            out[i, j] = stored[i, j] * scale[i // block[0], j // block[1]]
    return out


def opened(folder: Path, tensors: dict[str, torch.Tensor], layout: str = "single", **config: object) -> Checkpoint:
    write_checkpoint(folder, tensors, layout)
    write_config(folder, **config)
    source = open_plain(folder)
    assert isinstance(source, Checkpoint)
    return source


@pytest.mark.parametrize("layout", ["single", "sharded", "pickled", "sharded_bin"])
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("shape", [(8, 12), (7, 13), (3, 4), (1, 9), (5, 1)])
def test_blocks_with_partial_ends(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    scale = torch.rand(-(-shape[0] // 4), -(-shape[1] // 4)) + 0.5
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    tensors = {"m.weight": weight, "m.weight_scale_inv": scale, "m.input_scale": torch.tensor(1.0), "n": torch.ones(2)}
    source = opened(tmp_path, tensors, layout, quantization_config=settings)
    assert set(source.tensors) == {"m.weight", "n"}
    matrix = open_matrix(MatrixSource(source.tensors["m.weight"], View(shape)))
    wanted = by_element(weight.double().numpy(), scale.double().numpy(), (4, 4))
    assert matrix.rows(0, shape[0]).dtype == torch.float64
    assert np.array_equal(matrix.rows(0, shape[0]).numpy(), wanted)
    assert np.array_equal(matrix.rows(1, shape[0]).numpy(), wanted[1:])
    assert np.array_equal(matrix.columns(0, 3).numpy(), wanted[:, :3])
    assert np.array_equal(matrix.columns(2, 7).numpy(), wanted[:, 2:7])


def test_the_customary_block_is_128(tmp_path: Path) -> None:
    weight, scale = torch.randn(130, 257).to(FP8[0]), torch.rand(2, 3)
    source = opened(tmp_path, {"weight": weight, "weight_scale_inv": scale})
    assert source.tensors["weight"].block == (128, 128)
    matrix = open_matrix(MatrixSource(source.tensors["weight"], View((130, 257))))
    assert np.array_equal(matrix.rows(0, 130), by_element(weight.double().numpy(), scale.double().numpy(), (128, 128)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1), (1, 4)])
def test_scales_per_tensor_row_and_column(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(6, 4).to(FP8[0]), torch.rand(shape) + 0.5
    source = opened(tmp_path, {"weight": weight, "weight_scale": scale})
    matrix = open_matrix(MatrixSource(source.tensors["weight"], View((6, 4))))
    grid = scale.double().numpy().reshape(6, 1) if shape == (6,) else scale.double().numpy()
    assert np.array_equal(matrix.rows(0, 6).numpy(), weight.double().numpy() * grid)


@pytest.mark.parametrize(
    ("scale_shape", "view", "take"),
    [
        ((3, 2, 2), View((5, 6), expert=1), lambda w: w[1]),
        ((3, 2, 2), View((6, 5), expert=2, transposed=True), lambda w: w[2].T),
        ((3, 1, 1), View((5, 6), expert=1), lambda w: w[1]),
        ((3,), View((5, 6), expert=1), lambda w: w[1]),
        ((1,), View((5, 6), expert=2), lambda w: w[2]),
        ((3, 2, 2), View((2, 5), expert=0, transposed=True, groups=2, start=1, stop=2), lambda w: w[0].T[[1, 4]]),
    ],
)
def test_scaled_views(tmp_path: Path, scale_shape: tuple[int, ...], view: View, take: object) -> None:
    weight, scale = torch.randn(3, 5, 6).to(FP8[0]), torch.rand(scale_shape) + 0.5
    settings = {"quant_method": "fp8", "weight_block_size": [4, 3]}
    source = opened(tmp_path, {"w": weight, "w_scale_inv": scale}, quantization_config=settings)
    grid = scale.double().numpy().reshape(scale_shape if len(scale_shape) == 3 else (-1, 1, 1))
    grid = np.broadcast_to(grid, (3, *grid.shape[1:]))
    block = (4, 3) if grid.shape[1] == 2 else (5, 6)
    real = np.stack([by_element(w, s, block) for w, s in zip(weight.double().numpy(), grid, strict=True)])
    wanted = take(real)
    matrix = open_matrix(MatrixSource(source.tensors["w"], view))
    assert np.array_equal(matrix.rows(0, view.shape[0]).numpy(), wanted)
    assert np.array_equal(matrix.rows(1, 2).numpy(), wanted[1:2])
    assert np.array_equal(matrix.columns(2, 4).numpy(), wanted[:, 2:4])


def test_kernels_with_one_scale(tmp_path: Path) -> None:
    weight = torch.randn(4, 2, 3, 3).to(FP8[0])
    source = opened(tmp_path, {"w": weight, "w_scale": torch.tensor([0.25])})
    matrix = open_matrix(MatrixSource(source.tensors["w"], View((4, 18))))
    assert torch.equal(matrix.rows(0, 4), weight.double().reshape(4, 18) * 0.25)


def test_fp8_without_a_scale_is_read_as_it_is(tmp_path: Path) -> None:
    weight = torch.randn(4, 6).to(FP8[1])
    source = opened(tmp_path, {"w": weight})
    matrix = open_matrix(MatrixSource(source.tensors["w"], View((2, 6), groups=2, start=1)))
    assert torch.equal(matrix.rows(0, 2).double(), weight.double()[[1, 3]])


def test_attention_scales_leave_the_list_only_where_there_is_fp8(tmp_path: Path) -> None:
    scales = {"attn.k_scale": torch.ones(1), "attn.v_scale": torch.ones(1), "layer.gamma_scale": torch.ones(4)}
    plain = opened(tmp_path / "plain", {"w": torch.eye(2), **scales})
    assert set(plain.tensors) == {"w", *scales}
    quantised = opened(tmp_path / "fp8", {"w": torch.eye(2).to(FP8[0]), **scales})
    assert set(quantised.tensors) == {"w", "layer.gamma_scale"}


@pytest.mark.parametrize("shape", [(3, 3), (5,), (2, 2, 2), (0, 0)])
def test_scales_that_fit_no_block(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot dequantise 'w' in '.*model\.safetensors'"):
        opened(tmp_path, {"w": torch.zeros(6, 8).to(FP8[0]), "w_scale_inv": torch.ones(shape)})


@pytest.mark.parametrize("size", ["128", [0, 4], [4], [True, 4], 4])
def test_a_block_size_that_makes_no_sense(tmp_path: Path, size: object) -> None:
    with pytest.raises(CheckpointError, match="weight_block_size"):
        opened(tmp_path, {"w": torch.zeros(6, 8)}, quantization_config={"weight_block_size": size})


@pytest.mark.parametrize(
    ("names", "dtype", "scheme"),
    [
        (("q_proj.qweight", "q_proj.qzeros"), torch.int32, "GPTQ or AWQ"),
        (("w.weight", "w.weight.absmax"), torch.uint8, "bitsandbytes"),
        (("w.weight", "w.weight.quant_state.bitsandbytes__nf4"), torch.uint8, "bitsandbytes"),
        (("w.weight", "w.SCB"), torch.int8, "bitsandbytes"),
        (("w.weight_packed", "w.weight_shape"), torch.int32, "compressed-tensors"),
        (("w.weight", "w.weight_scale"), torch.int8, "I8 integers"),
        (("experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"), torch.uint8, "MXFP4"),
        (("w.weight", "w.weight_scale_2"), torch.uint8, "NVFP4"),
    ],
)
def test_other_schemes_are_refused_by_name(
    tmp_path: Path, names: tuple[str, ...], dtype: torch.dtype, scheme: str
) -> None:
    with pytest.raises(CheckpointError, match=f"quantised with {scheme}.*dequantise the model"):
        opened(tmp_path, {name: torch.zeros(4, 4, dtype=dtype) for name in names})


@pytest.mark.parametrize(
    ("method", "scheme"), [("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"), ("aqlm", "aqlm")]
)
def test_the_config_names_the_scheme(tmp_path: Path, method: str, scheme: str) -> None:
    with pytest.raises(CheckpointError, match=f"quantised with {scheme}"):
        opened(tmp_path, {"w": torch.zeros(4, 4)}, quantization_config={"quant_method": method})


def test_blocks_that_are_no_quantisation_are_read(tmp_path: Path) -> None:
    assert set(opened(tmp_path, {"stem_blocks": torch.eye(2), "stem_scales": torch.ones(2)}).tensors)


def test_dequantise_is_exact() -> None:
    values = torch.tensor([[1.75, -448.0]]).to(FP8[0])
    scale = torch.tensor([[1 / 3, 3e-4]], dtype=torch.float32)
    wanted = values.double().numpy() * scale.double().numpy()
    assert np.array_equal(dequantise(values, scale, (1, 1)).numpy(), wanted)
