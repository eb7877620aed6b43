"""fp8 weights under every name of their scales, against NumPy in float64; what is missing; what leaves with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import deltaspec
from deltaspec.io.content import same_content
from deltaspec.io.matrix import open_matrix, read_values
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint, MatrixSource, View
from tests.io.files import refusal, write_config

NAME, FP8 = "layers.0.mlp.up_proj.weight", torch.float8_e4m3fn
MODULE = NAME.removesuffix(".weight")
COMPANIONS = (f"{NAME}_scale_inv", f"{NAME}_scale", f"{MODULE}.scale", f"{MODULE}.scale_weight")
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
BLOCKS = {
    "one": ((1,), (256, 320)),
    "scalar": ((), (256, 320)),
    "rows": ((256,), (1, 320)),
    "rows as a column": ((256, 1), (1, 320)),
    "128 × 128": ((2, 3), (128, 128)),
    "of 32 columns": ((256, 10), (1, 32)),
    "musubi's": ((256, 5, 1), (1, 64)),
    "64 × 64": ((4, 5), (64, 64)),
}


def quantise(grid: tuple[int, ...], block: tuple[int, int], shape=(256, 320), powers=False):
    """Return stored values, their scales, and in NumPy what they stand for: a loop over blocks."""
    generator = torch.Generator().manual_seed(len(grid) + block[0])
    weight = 0.02 * torch.randn(shape, generator=generator)
    scales = np.zeros((-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    stored, real = torch.zeros(shape).to(FP8), np.zeros(shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale = float(np.float32(weight[place].abs().max() / 448))
            scales[i, j] = 2.0 ** np.ceil(np.log2(scale)) if powers else scale
            stored[place] = (weight[place] / scales[i, j]).to(FP8)
            real[place] = stored[place].double().numpy() * scales[i, j]
    return stored, torch.tensor(scales, dtype=torch.float32).reshape(grid), real


def written(folder: Path, tensors: dict[str, torch.Tensor], metadata=None, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    write_config(folder, **config)
    return folder


def read(folder: Path, name: str = NAME) -> np.ndarray:
    source = open_plain(folder)
    assert isinstance(source, Checkpoint)
    assert set(source.tensors) == {name}
    spec = source.tensors[name]
    shape = (spec.shape[0], int(np.prod(spec.shape[1:])))
    return open_matrix(MatrixSource(spec, View(shape))).rows(0, shape[0]).numpy()


@pytest.mark.parametrize(
    "companion", [f"{NAME}_scale_inv", f"{NAME}_scale", f"{MODULE}.scale", f"{MODULE}.scale_weight"]
)
@pytest.mark.parametrize("form", BLOCKS)
def test_every_name_and_form_of_a_scale(companion, form, tmp_path):
    grid, block = BLOCKS[form]
    stored, scale, real = quantise(grid, block)
    assert np.array_equal(read(written(tmp_path, {NAME: stored, companion: scale})), real)
    assert np.abs(real).max() < 0.2


@pytest.mark.parametrize("marks", [
    {"scaled_fp8": torch.zeros(2).to(FP8), f"{MODULE}.scale_input": torch.ones(1)},
    {"model.diffusion_model.scaled_fp8": torch.zeros(0).to(FP8)},
    {f"{MODULE}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)},
    {f"{MODULE}.input_scale": torch.ones(()), "attn.k_scale": torch.ones(1)},
])  # fmt: skip
def test_markers_and_activation_scales_are_no_weights(marks, tmp_path):
    stored, scale, real = quantise((1,), (256, 320))
    assert np.array_equal(read(written(tmp_path, {NAME: stored, f"{NAME}_scale": scale, **marks})), real)


@pytest.mark.parametrize(("grid", "block", "settings"), [
    ((256, 10), (1, 32), {}),
    ((256, 10), (1, 32), {"quant_method": "fp8", "weight_block_size": [1, 32]}),
    ((256, 10), (1, 32), {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    ((2, 3), (128, 128), {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}),
])  # fmt: skip
@pytest.mark.parametrize("stored_as", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_exponents(grid, block, settings, stored_as, tmp_path):
    stored, scale, real = quantise(grid, block, powers=True)
    exponents = (torch.log2(scale) + 127).to(torch.uint8).view(stored_as)
    config = {"quantization_config": settings} if settings else {}
    assert np.array_equal(read(written(tmp_path, {NAME: stored, f"{NAME}_scale": exponents}, **config)), real)


def test_a_head_and_an_embedding_with_exponents_are_found_to_be_one(tmp_path):
    stored, scale, _ = quantise((256, 10), (1, 32), powers=True)
    exponents = (torch.log2(scale) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    twice = {name: stored.clone() for name in names} | {f"{name}_scale": exponents.clone() for name in names}
    base = open_plain(written(tmp_path, twice))
    assert same_content(*(base.tensors[name] for name in names))
    twice["lm_head.weight_scale"].view(torch.uint8)[7, 7] += 1
    base = open_plain(written(tmp_path, twice))
    assert not same_content(*(base.tensors[name] for name in names))


def test_an_exponent_of_255_is_no_number(tmp_path):
    stored, scale, _ = quantise((256, 10), (1, 32))
    exponents = torch.full(scale.shape, 127, dtype=torch.uint8)
    exponents[3, 4] = 255
    found = read(written(tmp_path, {NAME: stored, f"{NAME}_scale": exponents}))
    assert np.isnan(found[3, 128:160]).all()
    assert np.isfinite(np.delete(found, 3, axis=0)).all()
    base = written(tmp_path / "base", {NAME: torch.zeros(256, 320)})
    (problem,) = deltaspec.analyze(base, tmp_path, tmp_path / "run").failures.values()
    assert f"'{NAME}_scale'" in str(problem)
    assert "(3, 4)" in str(problem)


def test_bytes_that_need_not_be_exponents_are_not_taken_for_them(tmp_path):
    stored, scale, _ = quantise((2, 3), (128, 128))
    assert "dtype U8" in refusal(written(tmp_path, {NAME: stored, f"{NAME}_scale": scale.to(torch.uint8)}))
    assert "dtype I32" in refusal(written(tmp_path, {NAME: stored, f"{NAME}_scale": scale.to(torch.int32)}))


def test_a_block_that_is_set_and_wrong_is_not_to_be_set(tmp_path):
    stored, scale, _ = quantise((256, 10), (1, 32))
    assert "correct weight_block_size" in refusal(written(tmp_path, {NAME: stored, f"{NAME}_scale": scale}, **CONFIG))


@pytest.mark.parametrize("layer", ["mxfp8", "nvfp4", "int8_tensorwise"])
def test_formats_of_comfyui_that_are_no_plain_product_are_named(layer, tmp_path):
    stored, scale, _ = quantise((256, 10), (1, 32))
    tensors = {NAME: stored, f"{NAME}_scale": scale}
    mark = torch.tensor(list(json.dumps({"format": layer}).encode()), dtype=torch.uint8)
    assert f"ComfyUI's {layer}" in refusal(written(tmp_path / "mark", {**tensors, f"{MODULE}.comfy_quant": mark}))
    told = {"_quantization_metadata": json.dumps({"layers": {MODULE: {"format": layer}}})}
    assert f"ComfyUI's {layer}" in refusal(written(tmp_path / "header", tensors, told))


SIGNS = {
    "config.json": ({}, CONFIG, "config.json says"),
    "a model inside": ({}, {"text_config": CONFIG}, "config.json says"),
    "compressed-tensors": ({}, {"compression_config": {"quant_method": "compressed-tensors"}}, "config.json says"),
    "a marker": ({"scaled_fp8": torch.zeros(2).to(FP8)}, {}, "'scaled_fp8' says"),
    "a layer's marker": ({f"{MODULE}.comfy_quant": torch.zeros(2, dtype=torch.uint8)}, {}, "comfy_quant' says"),
    "a name that is not known": ({f"{MODULE}.scales": torch.ones(1)}, {}, f"'{MODULE}.scales' may be a scale"),
    "a part of the weight": ({f"{NAME}.absmax_": torch.ones(1)}, {}, f"'{NAME}.absmax_' may be a scale"),
    "exponents": ({"exps": torch.ones(4).to(torch.float8_e8m0fnu)}, {}, "'exps' may be a scale"),
    "another tensor": ({"a.weight": torch.zeros(8, 8).to(FP8), "a.scale": torch.ones(1)}, {}, "'a.scale'"),
}  # fmt: skip


@pytest.mark.parametrize("sign", SIGNS)
def test_a_scale_that_is_missing(sign, tmp_path):
    beside, config, words = SIGNS[sign]
    plain = (0.02 * torch.randn(64, 64)).to(FP8)  # what it holds does not matter
    said = refusal(written(tmp_path, {NAME: plain, **beside}, **config))
    assert words in said
    assert f"'{NAME}'" in said
    assert "it has no scale" in said


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path):
    folder = written(tmp_path, {NAME: torch.ones(8, 8).to(FP8)})
    for settings, refused in (
        ({"kv_cache_quant_algo": "FP8", "quant_algo": None}, False),
        ({"quant_algo": "FP8"}, True),
    ):
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
        if refused:
            assert "hf_quant_config.json says" in refusal(folder)
        else:
            assert isinstance(open_plain(folder), Checkpoint)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_plain_cast_is_read_and_codes_are_not(dtype, tmp_path):
    weight = torch.randn(64, 64)
    source = open_plain(written(tmp_path / "cast", {NAME: weight.to(dtype)}))
    assert torch.equal(read_values(source.tensors[NAME]).double(), weight.to(dtype).double())
    codes = (weight / weight.abs().max() * torch.finfo(dtype).max).to(dtype)
    assert "are codes" in refusal(written(tmp_path / "codes", {NAME: codes}))
    few = {f"layers.{i}.q_proj.weight": weight.to(dtype) for i in range(2)}  # one large embedding is no evidence
    assert isinstance(open_plain(written(tmp_path / "mixed", {"embed_tokens.weight": codes, **few})), Checkpoint)


def test_two_companions_are_one_too_many(tmp_path):
    stored, scale, _ = quantise((1,), (256, 320))
    tensors = {NAME: stored, f"{NAME}_scale": scale, f"{MODULE}.scale_weight": scale.clone()}
    assert "both" in refusal(written(tmp_path, tensors))


@pytest.mark.parametrize("left", [f"{MODULE}.scale_weight", f"{NAME}_scale_inv"])
def test_a_scale_left_beside_plain_numbers(left, tmp_path):
    tensors = {NAME: torch.ones(8, 8).bfloat16(), left: torch.ones(1)}
    assert "multiplied already" in refusal(written(tmp_path, tensors))


def test_a_norm_with_a_weight_and_a_scale_is_left_alone(tmp_path):
    tensors = {"norm.weight": torch.ones(8), "norm.scale": torch.ones(8), "w_scale": torch.ones(2), "w": torch.ones(2)}
    assert set(open_plain(written(tmp_path, tensors)).tensors) == set(tensors)


def test_vectors_with_a_scale_are_analysed_as_what_they_stand_for(tmp_path):
    stored = torch.tensor([448.0, 224.0, 0.0, 112.0])
    quantised = {"norm.weight": stored.to(FP8), "norm.weight_scale": torch.tensor(1 / 64)}
    matrix = {NAME: torch.eye(4)}
    run = deltaspec.analyze(
        written(tmp_path / "a", {"norm.weight": torch.ones(4), **matrix}),
        written(tmp_path / "b", {**quantised, NAME: 2 * torch.eye(4)}),
        tmp_path / "run",
    )
    row = next(row for row in run.vectors if row["tensor"] == "norm.weight")
    wanted = np.linalg.norm(stored.numpy() / 64 - 1) / 2
    assert row["relative_norm"] == pytest.approx(wanted, rel=1e-12)
