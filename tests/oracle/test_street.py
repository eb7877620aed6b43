"""The whole street against NumPy float64: every family, every dtype, every layout."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import deltaspec
from deltaspec.architecture.match import identify
from deltaspec.architecture.views import view_matrix
from deltaspec.delta import DenseDelta
from deltaspec.types import MatrixSource, TensorSpec, View
from tests.families import FAMILIES, random_state, write
from tests.oracle.reference import metrics

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CPU = deltaspec.AnalyzeOptions(device="cpu")


def tune(state, share=0.03):
    """A rank-2 update and a little dense noise on every floating tensor, rounded to the tensor's dtype."""
    generator = torch.Generator().manual_seed(1)
    tuned = {}
    for name, tensor in state.items():
        flat = tensor.double().reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.double().reshape(1, -1)
        low = torch.randn(flat.shape[0], 2, generator=generator, dtype=torch.float64)
        update = low @ torch.randn(2, flat.shape[1], generator=generator, dtype=torch.float64)
        update += 0.05 * torch.randn(flat.shape, generator=generator, dtype=torch.float64)
        tuned[name] = (flat + share * update).reshape(tensor.shape).to(tensor.dtype)
    return tuned


def store(folder, state, config, layout):
    if layout != "pickled":
        return write(folder, state, config, shards=3 if layout == "sharded" else 1)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": state}, folder / "pytorch_model.bin")
    return folder


def assert_equal(found, expected, where):
    for name, value in expected.items():
        got = found[name]
        if value is None or isinstance(value, bool | np.bool_):
            assert got == value, (where, name)
        elif isinstance(value, int | np.integer):
            assert got == value, (where, name, got, value)
        else:
            assert got == pytest.approx(value, rel=2e-6, abs=1e-12), (where, name)


@pytest.mark.parametrize("layout", ["single", "sharded", "pickled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_dtype_and_layout(name, dtype, layout, tmp_path):
    family = FAMILIES[name]
    base = random_state(family, dtype=DTYPES[dtype])
    tuned = tune(base)
    folders = [store(tmp_path / side, state, family.config, layout) for side, state in (("b", base), ("t", tuned))]
    run = deltaspec.analyze(*folders, tmp_path / "run", options=CPU)
    assert not run.failures
    known = identify({n: tuple(t.shape) for n, t in base.items()}, family.config)
    tied = {row["tensor"] for row in run.skipped}
    expected = {i.key: i.view for n, found in known.matrices.items() if n not in tied for i in found}
    assert {record.key for record in run.records} == set(expected)
    for record in run.records:
        before, after = (
            view_matrix(s[record.key.tensor], expected[record.key]).double().numpy() for s in (base, tuned)
        )
        assert (record.base_dtype, record.tuned_dtype) == (dtype, dtype)
        assert_equal(record.metrics, metrics(before, after, dtype), record.store_key)
        values = run.spectrum(record.store_key).singular_values.numpy()
        exact = np.linalg.svd(after - before, compute_uv=False)
        assert abs(values - exact).max() <= record.error_bound
    changes = {row["tensor"]: row["relative_norm"] for row in run.vectors}
    assert set(changes) == set(known.vectors) - tied
    for tensor, change in changes.items():
        before, after = base[tensor].double(), tuned[tensor].double()
        assert change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-12)


def test_fp8_with_block_scales_is_dequantised_and_its_rounding_known(tmp_path):
    """Both sides fp8: the edge holds the rounding of both, and covers it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 256, generator=generator) * 0.02
    update = torch.randn(384, 4, generator=generator) @ torch.randn(4, 256, generator=generator) * 0.004
    dense = {}
    for side, real in (("base", weight), ("tuned", weight + update)):
        scale = real.view(3, 128, 2, 128).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        codes = (real / spread).to(torch.float8_e4m3fn)
        dense[side] = codes.double() * spread.double()
        name = "model.layers.0.self_attn.q_proj.weight"
        (tmp_path / side).mkdir()
        save_file({name: codes, f"{name}_scale_inv": scale}, tmp_path / side / "model.safetensors")
        config = {
            "model_type": "llama",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        }
        (tmp_path / side / "config.json").write_text(json.dumps(config))
    run = deltaspec.analyze(tmp_path / "base", tmp_path / "tuned", tmp_path / "run", options=CPU)
    (record,) = run.records
    exact = np.linalg.svd((dense["tuned"] - dense["base"]).numpy(), compute_uv=False)
    assert abs(run.spectrum(record.store_key).singular_values.numpy() - exact).max() < 1e-6 * exact[0]
    noise = np.linalg.svd((dense["tuned"] - dense["base"] - update.double()).numpy(), compute_uv=False)
    assert 1 < record.metrics["rounding_edge"] / noise[0] < 1.3
    assert record.metrics["rank_above_rounding"] == 4


@pytest.mark.parametrize("tuned_dtype", ["BF16", "F32"])
def test_an_fp8_base_leaves_its_own_rounding(tuned_dtype, tmp_path):
    """Only the base is quantised: the edge covers its rounding, in its own unit, and the planted rank is found."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator) * 0.02
    update = torch.randn(256, 4, generator=generator) @ torch.randn(4, 256, generator=generator) * 0.004
    codes = (weight / 4e-4).to(torch.float8_e4m3fn)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: codes, f"{name}_scale": torch.tensor([4e-4])}, tmp_path / "base.safetensors")
    tuned = (weight + update).to(DTYPES[tuned_dtype])
    save_file({name: tuned}, tmp_path / "tuned.safetensors")
    run = deltaspec.analyze(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "run", options=CPU
    )
    noise = tuned.double() - codes.double() * float(torch.tensor(4e-4)) - update.double()
    assert 1 < run.records[0].metrics["rounding_edge"] / float(torch.linalg.matrix_norm(noise, 2)) < 1.3
    assert run.records[0].metrics["rank_above_rounding"] == 4


def test_fp8_without_scales_is_what_it_says(tmp_path):
    generator = torch.Generator().manual_seed(0)
    states = [{"l.0.q_proj.weight": torch.randn(32, 16, generator=generator).to(torch.float8_e4m3fn)} for _ in range(2)]
    for side, state in zip(("base", "tuned"), states, strict=True):
        save_file(state, tmp_path / f"{side}.safetensors")
    run = deltaspec.analyze(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "run", options=CPU
    )
    before, after = (state["l.0.q_proj.weight"].double().numpy() for state in states)
    exact = np.linalg.svd(after - before, compute_uv=False)
    assert np.allclose(run.spectrum("l.0.q_proj.weight").singular_values.numpy(), exact, rtol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "unet"])
def test_left_values_right_multiply_to_plus_the_change(name, tmp_path):
    """W_tuned - W_base, not its negative, in the matrix's own orientation."""
    family = next(f for key, f in FAMILIES.items() if key.startswith(name))
    base = random_state(family)
    tuned = tune(base)
    folders = [write(tmp_path / side, state, family.config) for side, state in (("b", base), ("t", tuned))]
    run = deltaspec.analyze(*folders, tmp_path / "run", options=deltaspec.AnalyzeOptions(device="cpu", vectors=10**6))
    known = identify({n: tuple(t.shape) for n, t in base.items()}, family.config)
    views = {str(i.key): i.view for found in known.matrices.values() for i in found}
    for record in run.records:
        view = views[record.store_key]
        before, after = (view_matrix(state[record.key.tensor], view).double() for state in (base, tuned))
        found = run.spectrum(record.store_key)
        k = found.left.shape[1]
        product = (found.left * found.singular_values[:k]) @ found.right.mT
        assert (product - (after - before)).norm() < 1e-6 * (after - before).norm()


def test_bf16_saved_as_fp16_is_seen(tmp_path):
    family = FAMILIES["llama"]
    base = {n: (t * 0.02).bfloat16() for n, t in random_state(family).items()}
    tuned = {n: t.bfloat16().half() for n, t in tune({n: t.float() for n, t in base.items()}, 6e-4).items()}
    kept = {n: t for n, t in tuned.items() if torch.equal(t.bfloat16().half(), t)}
    folders = [write(tmp_path / side, state, family.config) for side, state in (("b", base), ("t", tuned))]
    run = deltaspec.analyze(*folders, tmp_path / "run", options=CPU)
    seen = {r.key.tensor for r in run.records if any("BF16 saved as F16" in note for note in r.notes)}
    assert seen == {r.key.tensor for r in run.records} & set(kept)
    assert seen


@pytest.mark.parametrize(("before", "after"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16"), ("F64", "F32")])
def test_two_dtypes_meet_in_float64(before, after, tmp_path):
    """The difference is that of the stored numbers; rounding is the tuned file's."""
    family = FAMILIES["llama"]
    exact = random_state(family, dtype=torch.float64)
    base = {n: t.to(DTYPES[before]) for n, t in exact.items()}
    tuned = {n: t.to(DTYPES[after]) for n, t in tune(exact).items()}
    folders = [write(tmp_path / side, state, family.config) for side, state in (("b", base), ("t", tuned))]
    run = deltaspec.analyze(*folders, tmp_path / "run", options=CPU)
    for record in run.records:
        assert (record.base_dtype, record.tuned_dtype) == (before, after)
        expected = metrics(*(state[record.key.tensor].double().numpy() for state in (base, tuned)), after)
        if before == "F64":  # numerical rank follows the finer of both files
            del expected["numerical_rank"]
        assert_equal(record.metrics, expected, record.store_key)


def test_bf16_saved_as_fp32_is_seen(tmp_path):
    """Values that lie on bf16's grid carry bf16's rounding, whatever dtype they are stored in."""
    family = FAMILIES["llama"]
    base = {n: t.float() for n, t in random_state(family, dtype=torch.bfloat16).items()}
    tuned = {n: t.bfloat16().float() for n, t in tune(base).items()}
    folders = [write(tmp_path / side, state, family.config) for side, state in (("b", base), ("t", tuned))]
    run = deltaspec.analyze(*folders, tmp_path / "run", options=CPU)
    for record in run.records:
        before, after = (state[record.key.tensor].double().numpy() for state in (base, tuned))
        assert record.metrics["rounding_edge"] == pytest.approx(
            metrics(before, after, "BF16")["rounding_edge"], rel=1e-6
        )
        assert any("BF16 saved as F32" in note for note in record.notes)


def test_a_pass_leaves_no_file_mapped(tmp_path):
    """What outlives a pass is numbers: mapped files would count as memory while eigenvalues are computed."""
    state = {"w": torch.randn(64, 32, generator=torch.Generator().manual_seed(0))}
    sources = []
    for side in ("base", "tuned"):
        file = write(tmp_path / side, {"w": state["w"] + len(side)}, {}) / "model.safetensors"
        sources.append(MatrixSource(TensorSpec("w", file, (64, 32), "F32"), View((64, 32))))
    delta = DenseDelta(*sources, device=torch.device("cpu"))
    assert sum(len(block) for block in delta.blocks()) == 64
    assert delta.rounding.grid == "F32"
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("options", [{}, {"vectors": 3}, {"exact": True}], ids=str)
def test_one_worker_and_two_give_the_same_bits(options, tmp_path):
    """One BLAS thread works on each matrix, so how many are in flight changes no rounding."""
    family = FAMILIES["llama"]
    base = random_state(family, dtype=torch.bfloat16)
    folders = [write(tmp_path / side, state, family.config) for side, state in (("b", base), ("t", tune(base)))]
    runs = []
    for workers in (1, 2, 2):
        chosen = deltaspec.AnalyzeOptions(device="cpu", workers=workers, **options)
        runs.append(deltaspec.analyze(*folders, tmp_path / f"run{len(runs)}", options=chosen))
    for record in runs[0].records:
        first, *others = (run.spectrum(record.store_key) for run in runs)
        for other in others:
            assert torch.equal(first.singular_values, other.singular_values)
            assert first.left is None or torch.equal(first.left, other.left)
    assert [r.metrics for r in runs[0].records] == [r.metrics for r in runs[1].records]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral_stacked"])
def test_the_gpu_measures_what_the_cpu_does(name, dtype, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    family = FAMILIES[name]
    base = random_state(family, dtype=DTYPES[dtype])
    folders = [write(tmp_path / side, state, family.config) for side, state in (("b", base), ("t", tune(base)))]
    one, other = (
        deltaspec.analyze(*folders, tmp_path / device, options=deltaspec.AnalyzeOptions(device=device))
        for device in ("cpu", "cuda")
    )
    for record, twin in zip(one.records, other.records, strict=True):
        assert_equal(twin.metrics, record.metrics, record.store_key)
