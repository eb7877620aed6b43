"""What DeepSpeed ZeRO-3 saved empty, or a quantised model as integers: refused in every command, not dropped."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.cli.main import cli
from deltaspec.io.open import open_plain
from tests.families import FAMILIES, random_state, write
from tests.io.test_peft import factors, write_adapter

LLAMA = FAMILIES["llama"]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", random_state(LLAMA), LLAMA.config)


@pytest.fixture
def tuned(tmp_path):
    return write(tmp_path / "tuned", random_state(LLAMA, seed=1), LLAMA.config)


def lora(folder, **extra):
    d_out, d_in = LLAMA.tensors[f"{Q}.weight"]
    tensors = factors(Q, d_out=d_out, d_in=d_in)
    prefix = next(iter(tensors)).partition(Q)[0]
    tensors |= {f"{prefix}{name}": tensor for name, tensor in extra.items()}
    return write_adapter(folder, tensors, modules_to_save=["lm_head"])


def refused(*arguments):
    result = CliRunner().invoke(cli, [str(word) for word in arguments])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


HEAD = "lm_head.weight"
DAMAGED = {
    "empty": (HEAD, torch.empty(0), "shape (0,)", "ZeRO-3"),
    "empty, two axes": (HEAD, torch.empty(0, 16), "shape (0, 16)", "ZeRO-3"),
    "half": (HEAD, torch.empty(0, dtype=torch.bfloat16), "shape (0,)", "ZeRO-3"),
    "bytes": (HEAD, torch.zeros(320, 1, dtype=torch.uint8), "dtype U8 and shape (320, 1)", "not quantised"),
    "integers": (HEAD, torch.zeros(LLAMA.tensors[HEAD], dtype=torch.int8), "dtype I8", "not quantised"),
    "a bias": ("lm_head.bias", torch.zeros(7, dtype=torch.int32), "dtype I32", "not quantised"),
    "a norm": ("model.norm.weight", torch.empty(0), "shape (0,)", "ZeRO-3"),
    "A": (f"{Q}.lora_A.weight", torch.empty(0), "shape (0,)", "ZeRO-3"),
    "B": (f"{Q}.lora_B.weight", torch.empty(0), "shape (0,)", "ZeRO-3"),
    "factor": (f"{Q}.lora_A.weight", torch.zeros(2, 16, dtype=torch.int8), "dtype I8", "not quantised"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_adapter_stops_every_command(tmp_path, base, tuned, case):
    name, tensor, found, advice = DAMAGED[case]
    adapter, out = lora(tmp_path / "adapter", **{name: tensor}), tmp_path / "out"
    for command in (["merge", base, adapter, "-o", out], ["analyze", base, adapter, "-o", out]):
        said = refused(*command)
        assert f"{name}'" in said
        assert f"'{adapter / 'adapter_model.safetensors'}'" in said
        assert found in said
        assert advice in said
    assert found in refused("verify", base, tuned, adapter)
    assert found in refused("combine", adapter, adapter, "-o", out)
    assert not out.exists()


def test_integers_that_are_no_parameters_are_no_damage(tmp_path, base):
    """A batch norm's counter and an embedding's positions are buffers that modules_to_save brings along."""
    buffers = {"norm.num_batches_tracked": torch.tensor(3), "embeddings.position_ids": torch.arange(4)[None]}
    assert open_plain(lora(tmp_path / "adapter", **buffers)).modules


def test_integers_where_the_base_has_floats_are_refused_by_any_name(tmp_path):
    state = random_state(LLAMA) | {"model.queries": torch.randn(4, 4)}
    base = write(tmp_path / "base", state, LLAMA.config)
    adapter = lora(tmp_path / "adapter", **{"model.queries": torch.zeros(4, 4, dtype=torch.int64)})
    assert "I64" in refused("merge", base, adapter, "-o", tmp_path / "out")


def test_a_checkpoint_of_empty_matrices_was_not_gathered(tmp_path, base):
    state = {name: tensor if tensor.ndim == 1 else torch.empty(0) for name, tensor in random_state(LLAMA).items()}
    tuned, out = write(tmp_path / "z3", state, LLAMA.config), tmp_path / "out"
    for command in ("analyze", "extract"):
        said = refused(command, base, tuned, "-o", out)
        assert "the tuned model stores it empty, with shape (0,), where the base has (" in said
        assert "zero_to_fp32.py" in said
        assert f"'{tuned / 'model.safetensors'}'" in said
    assert "the base stores it empty" in refused("analyze", tuned, base, "-o", out)


@pytest.mark.parametrize("prefix", ["module.", "base_model."])
def test_one_empty_matrix_is_enough_under_a_wrappers_name_too(tmp_path, base, prefix):
    state = random_state(LLAMA, seed=1) | {f"{Q}.weight": torch.empty(0)}
    tuned = write(tmp_path / "z3", {f"{prefix}{name}": tensor for name, tensor in state.items()}, LLAMA.config)
    assert f"'{prefix}{Q}.weight'" in refused("analyze", base, tuned, "-o", tmp_path / "out")


def test_a_matrix_stored_as_integers_beside_floats_is_refused(tmp_path, base):
    shape = LLAMA.tensors[f"{Q}.weight"]
    state = random_state(LLAMA, seed=1) | {f"{Q}.weight": torch.ones(shape, dtype=torch.int8)}
    said = refused("extract", base, write(tmp_path / "int8", state, LLAMA.config), "-o", tmp_path / "out")
    assert "its dtype is I8" in said
    assert "dequantise" in said


def test_a_mask_stored_as_floats_here_and_as_integers_there_is_no_damage(tmp_path):
    """GPT-2's attn.bias and CLIP's position_ids changed their dtype with versions of transformers."""
    kinds = (torch.float32, torch.bool), (torch.int64, torch.float32)
    sides = []
    for number, (mask, places) in enumerate(zip(*kinds, strict=True)):
        state = random_state(LLAMA, seed=number)
        state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4).to(mask), "position_ids": torch.arange(4)[None].to(places)}
        sides.append(write(tmp_path / str(number), state, LLAMA.config))
    run = deltaspec.analyze(*sides, tmp_path / "run")
    assert {row["tensor"] for row in run.manifest["skipped"]} == {"h.0.attn.bias", "position_ids"}
    assert len(run.records) == len([name for name, shape in LLAMA.tensors.items() if len(shape) > 1])


def test_what_is_empty_on_both_sides_is_no_damage(tmp_path):
    states = [random_state(LLAMA, seed=seed) | {"model.unused.weight": torch.empty(0, 4)} for seed in (0, 1)]
    base, tuned = (write(tmp_path / str(number), state, LLAMA.config) for number, state in enumerate(states))
    assert deltaspec.analyze(base, tuned, tmp_path / "run").records
    adapter = lora(tmp_path / "adapter")
    deltaspec.merge(base, [adapter], tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors")["model.unused.weight"].shape == (0, 4)


def test_integers_in_kohyas_naming_are_no_factors(tmp_path):
    d_out, d_in = LLAMA.tensors[f"{Q}.weight"]
    flat = f"lora_te_{Q.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": torch.ones(2, d_in, dtype=torch.int8), f"{flat}.alpha": torch.tensor(2)}
    save_file(tensors | {f"{flat}.lora_up.weight": torch.ones(d_out, 2)}, tmp_path / "style.safetensors")
    base = write(tmp_path / "base", random_state(LLAMA), LLAMA.config)
    assert "lora_down.weight' in" in refused("merge", base, tmp_path / "style.safetensors", "-o", tmp_path / "out")


def test_an_adapter_that_is_attached_is_looked_at_too(tmp_path, base):
    pytest.importorskip("transformers")
    d_out, d_in = LLAMA.tensors[f"{Q}.weight"]
    for empty in ("lora_magnitude_vector", "lora_A.weight"):
        tensors = factors(Q, d_out=d_out, d_in=d_in) | {f"{Q}.lora_magnitude_vector": torch.ones(d_out)}
        tensors[f"{Q}.{empty}"] = torch.empty(0)
        adapter = write_adapter(tmp_path / empty, tensors, use_dora=True, target_modules=["q_proj"])
        said = refused("analyze", base, adapter, "-o", tmp_path / "out")
        assert "ZeRO-3" in said
        assert f"{Q}.{empty}'" in said
