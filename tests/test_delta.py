"""ΔW and the rounding in it against NumPy float64, for every kind of storage, in one block and in several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltaspec import delta as room
from deltaspec.delta import DenseDelta, energy_of, stream
from deltaspec.io.open import open_source
from deltaspec.types import Checkpoint, MatrixSource, View
from tests.oracle.reference import ulp

CPU = torch.device("cpu")
SHAPES = [(200, 9), (9, 200), (70, 70), (1, 5)]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(params=[1 << 19, 1], ids=["one block", "blocks of 64"])
def _cut(request, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", request.param)


def source(folder: Path, name: str, tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> MatrixSource:
    save_file(tensors, folder / f"{name}.safetensors")
    opened = open_source(folder / f"{name}.safetensors")
    assert isinstance(opened, Checkpoint)
    return MatrixSource(opened.tensors["weight"], View(shape))


def weights(shape, seed=0):
    """Over a few binades, so that spacings differ; the last row and column are larger than all others."""
    random = np.random.default_rng(seed)
    found = random.standard_normal(shape) * 2.0 ** random.integers(-3, 2, shape)
    found[-1] *= 8
    found[:, -1] *= 8
    return torch.from_numpy(found)


def tuned_from(base, *, untouched=True):
    """Change all but a third of the elements, and nothing in each third row and column."""
    change = 0.1 * weights(base.shape, seed=1)
    change[torch.from_numpy(np.random.default_rng(2).random(base.shape) < 1 / 3)] = 0
    if untouched and min(base.shape) > 3:
        change[::3] = 0
        change[:, ::3] = 0
    return base.double() + change


def pair(folder, base, tuned):
    shape = tuple(base.shape)
    sides = source(folder, "base", {"weight": base}, shape), source(folder, "tuned", {"weight": tuned}, shape)
    return DenseDelta(*sides, device=CPU)


def whole(blocks, shape):
    axis = 0 if shape[0] >= shape[1] else 1
    return torch.cat([block.clone() for block in blocks], dim=axis)


def check_rounding(rounding, delta, squares, *, eps, grid):
    """Squared spacings count over rows of a tall matrix, or columns of a wide one, that changed at all."""
    touched = (delta != 0).any(1, keepdims=True) if delta.shape[0] >= delta.shape[1] else (delta != 0).any(0)
    squares = squares * touched
    assert rounding.unchanged == pytest.approx((delta == 0).mean(), abs=1e-15)
    assert rounding.ulp_energy == pytest.approx(squares.sum(), rel=1e-12, abs=0)
    assert rounding.row_max == pytest.approx(squares.sum(1).max(), rel=1e-12, abs=0)
    assert rounding.column_max == pytest.approx(squares.sum(0).max(), rel=1e-12, abs=0)
    assert (rounding.eps, rounding.grid) == (eps, grid)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("BF16", "BF16"),
        ("F16", "F16"),
        ("F32", "F32"),
        ("F64", "F64"),
        ("BF16", "F32"),
        ("F32", "BF16"),
        ("F64", "F32"),
        ("F32", "F64"),
    ],
)
def test_difference_energy_and_rounding_are_numpys(tmp_path, shape, first, second):
    base = weights(shape).to(DTYPES[first])
    tuned = tuned_from(base).to(DTYPES[second])
    found = pair(tmp_path, base, tuned)
    delta = tuned.double().numpy() - base.double().numpy()
    assert found.shape == shape
    for _ in range(2):  # a second pass starts again
        assert np.array_equal(whole(found.blocks(), shape).numpy(), delta)
    assert found.base_energy == pytest.approx((base.double().numpy() ** 2).sum(), rel=1e-13, abs=0)
    eps = 2.0 ** (-52 if "F64" in (first, second) else -23)
    check_rounding(found.rounding, delta, ulp(tuned.double().numpy(), second) ** 2, eps=eps, grid=second)
    fresh = DenseDelta(found.base, found.tuned, device=CPU)
    assert fresh.rounding == found.rounding  # asked for first, it takes a pass of its own


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize(
    ("stored", "grid"),
    [("F64", "F32"), ("F64", "F16"), ("F64", "BF16"), ("F32", "F16"), ("F32", "BF16"), ("F16", "BF16")],
)
@pytest.mark.parametrize("late", [False, True])
def test_values_upcast_on_saving_have_the_spacing_of_their_grid(tmp_path, stored, grid, late):
    """One value off the coarse grid, in the last block, and the stored spacing holds; binades are the values' own."""
    shape = (130, 6)
    base = weights(shape).clamp(-3, 3).to(DTYPES[grid])
    tuned = tuned_from(base, untouched=False)
    tuned = tuned.where(tuned.abs() > 2.0**-10, 0.5).to(DTYPES[grid]).to(DTYPES[stored])  # nothing is subnormal in fp16
    if late:
        tuned[-1, -1] = float(np.nextafter(*np.array([float(tuned[-1, -1]), 9.0], dtype=tuned.numpy().dtype)))
    found = pair(tmp_path, base, tuned)
    delta = tuned.double().numpy() - base.double().numpy()
    wanted = stored if late else grid
    spacing = ulp(tuned.double().numpy(), wanted)
    check_rounding(found.rounding, delta, spacing**2, eps=2.0 ** (-52 if stored == "F64" else -23), grid=wanted)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_difference_held_whole_is_read_from_memory(tmp_path, shape, dtype):
    base = weights(shape).to(DTYPES[dtype])
    tuned = tuned_from(base).to(DTYPES[dtype])
    streamed, held = pair(tmp_path, base, tuned), pair(tmp_path, base, tuned)
    delta = whole(streamed.blocks(), shape)
    found = held.hold()
    assert (found.dtype, tuple(found.shape)) == (torch.float32, shape)
    assert torch.equal(found.double(), delta.float().double())
    assert held.rounding == streamed.rounding
    assert held.base_energy == pytest.approx(streamed.base_energy, rel=1e-12, abs=0)
    found[0, 0] = 77.0  # later passes read what is held, not the files
    again = whole(held.blocks(), shape)
    assert (again.dtype, float(again[0, 0])) == (torch.float64, 77.0)
    assert torch.equal(again.flatten()[1:], found.double().flatten()[1:])


@pytest.mark.parametrize(("first", "second"), [("F32", "BF16"), ("BF16", "F32"), ("F64", "F64"), ("F32", "F32")])
def test_what_float32_cannot_hold_is_only_streamed(tmp_path, first, second):
    base = weights((9, 7)).to(DTYPES[first])
    assert pair(tmp_path, base, tuned_from(base).to(DTYPES[second])).hold() is None


def test_two_16_bit_kinds_may_be_held(tmp_path):
    base = weights((9, 7)).to(torch.float16)
    tuned = tuned_from(base).to(torch.bfloat16)
    assert torch.equal(pair(tmp_path, base, tuned).hold(), tuned.float() - base.float())


def spacing_of_codes(codes, dtype):
    mantissa, smallest = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}[dtype]
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(codes), 2.0**smallest))) - mantissa)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_quantised_base_was_rounded_too(tmp_path, shape, dtype, scaled):
    codes = weights(shape).to(dtype)
    scale = torch.linspace(0.5, 2, shape[0])[:, None].double() if scaled else torch.ones(1, 1).double()
    base = codes.double() * scale
    tuned = tuned_from(base).to(torch.bfloat16)
    tensors = {"weight": codes, "weight_scale": scale.float()} if scaled else {"weight": codes}
    found = DenseDelta(
        source(tmp_path, "base", tensors, shape), source(tmp_path, "tuned", {"weight": tuned}, shape), device=CPU
    )
    scale = scale.float().double()
    delta = tuned.double().numpy() - (codes.double() * scale).numpy()
    assert np.allclose(whole(found.blocks(), shape).numpy(), delta, rtol=1e-14, atol=0)
    squares = ulp(tuned.double().numpy(), "BF16") ** 2
    squares = squares + (spacing_of_codes(codes.double().numpy(), dtype) * scale.numpy()) ** 2
    check_rounding(found.rounding, delta, squares, eps=2.0**-23, grid="BF16")
    assert found.hold() is None


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scaled", [False, True])
def test_quantised_on_the_tuned_side(tmp_path, dtype, scaled):
    """Spacings are those of the codes times their scale; an exact base adds none, and no coarser grid is looked for."""
    shape = (130, 6)
    base, codes = weights(shape).float(), weights(shape, seed=3).to(dtype)
    scale = torch.linspace(0.5, 2, 130)[:, None] if scaled else torch.ones(1, 1)
    tensors = {"weight": codes, "weight_scale": scale} if scaled else {"weight": codes}
    found = DenseDelta(
        source(tmp_path, "base", {"weight": base}, shape), source(tmp_path, "tuned", tensors, shape), device=CPU
    )
    delta = codes.double().numpy() * scale.double().numpy() - base.double().numpy()
    assert np.allclose(whole(found.blocks(), shape).numpy(), delta, rtol=1e-13, atol=1e-15)
    squares = (spacing_of_codes(codes.double().numpy(), dtype) * scale.double().numpy()) ** 2
    grid = "F8_E4M3" if dtype == FP8[0] else "F8_E5M2"
    check_rounding(found.rounding, delta, squares, eps=2.0**-23, grid=grid)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), *FP8])
def test_one_matrix_streamed(tmp_path, shape, dtype):
    stored = weights(shape).to(dtype)
    found = source(tmp_path, "one", {"weight": stored}, shape)
    blocks = [block.clone() for block in stream(found, device=CPU)]
    assert all(block.dtype == torch.float64 and block.is_contiguous() for block in blocks)
    assert len(blocks) == (1 if room.BLOCK > 1 else -(-max(shape) // 64))
    assert torch.equal(whole(blocks, shape), stored.double())
    assert energy_of(found, device=CPU) == pytest.approx((stored.double().numpy() ** 2).sum(), rel=1e-13, abs=0)


def test_blocks_have_half_a_million_elements_and_no_fewer_than_64_rows(tmp_path):
    for shape, longest in (((5000, 210), 2496), ((70, 30000), 7489), ((200, 9000), 2621)):
        found = source(tmp_path, "one", {"weight": torch.zeros(shape)}, shape)
        lengths = [block.shape[shape.index(max(shape))] for block in stream(found, device=CPU)]
        assert max(lengths) == lengths[0] == longest == 2**19 // min(shape)
        assert sum(lengths) == max(shape)
