"""Sentences that end a command: their advice fits what is wrong, and the command that says it.

That no command offers an option which it lacks is checked for every error of every test: tests/conftest.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deltaspec.cli.main import cli
from tests.families import FAMILIES, random_state, write

Q = "model.layers.0.self_attn.q_proj"
LLAMA = FAMILIES["llama"]


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def lora(folder, shapes, *, base="elsewhere"):
    """Write an adapter with random factors of rank 2 for (d_out, d_in) of each module."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(4), {}
    for path, (d_out, d_in) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, d_in, generator=generator)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(d_out, 2, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(shapes)}
    config |= {"base_model_name_or_path": str(base), "peft_version": "0.21.2"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", random_state(LLAMA), LLAMA.config)


@pytest.fixture
def tuned(tmp_path):
    return write(tmp_path / "tuned", random_state(LLAMA, seed=1), LLAMA.config)


@pytest.mark.parametrize("own", [True, False])
def test_a_base_is_not_asked_for_where_it_is_that_base(own, base, tmp_path):
    adapter = lora(tmp_path / "adapter", {f"{Q}_added": (24, 24), Q: (24, 24)}, base=base if own else "elsewhere")
    for command in ("merge", "analyze"):
        done = run(command, base, adapter, "-o", tmp_path / "out", "--quiet")
        assert done.exit_code == 2
        assert f"'{Q}_added.weight'" in done.stderr
        assert ("its config says 'elsewhere'" in done.stderr) == (not own)
        assert ("changed after loading" in done.stderr) == own


def test_one_expert_of_a_stack_is_named_as_such(tmp_path):
    family = FAMILIES["mixtral_stacked"]
    base = write(tmp_path / "base", random_state(family), family.config)
    stack = next(name for name in family.tensors if name.endswith("experts.down_proj"))
    shape = family.tensors[stack][1:]
    adapter = lora(tmp_path / "adapter", {stack.replace("experts.", "experts.1."): shape}, base=base)
    done = run("merge", base, adapter, "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 2
    assert "it is one expert" in done.stderr
    assert f"stores '{stack.removesuffix('.down_proj')}' as stacks" in done.stderr
    assert "save_original_format" in done.stderr


@pytest.mark.parametrize("command", ["analyze", "extract", "verify", "merge"])
def test_another_shape_is_said_with_what_the_command_can_do(command, base, tuned, tmp_path):
    adapter = lora(tmp_path / "adapter", {Q: (12, 24)})
    given = {"verify": (base, tuned, adapter)}.get(command, (base, adapter, "-o", tmp_path / "out"))
    done = run(command, *given, "--quiet")
    assert done.exit_code == 2
    assert "(12, 24)" in done.stderr
    assert ("--exclude" in done.stderr) == (command in ("analyze", "extract"))
    assert "base" in done.stderr


@pytest.mark.parametrize("command", ["analyze", "extract", "verify"])
def test_a_vocabulary_of_another_size_is_said_with_what_the_command_can_do(command, base, tuned, tmp_path):
    state = load_file(tuned / "model.safetensors")
    grown = {n: torch.cat([w, w[:2]]) if "embed_tokens" in n or "lm_head" in n else w for n, w in state.items()}
    save_file(grown, tuned / "model.safetensors", metadata={"format": "pt"})
    adapter = lora(tmp_path / "adapter", {Q: (24, 24)})
    given = (base, tuned, adapter) if command == "verify" else (base, tuned, "-o", tmp_path / "out")
    done = run(command, *given, "--quiet")
    assert done.exit_code == 2
    assert "--vocab common" in done.stderr
    assert ("--exclude" in done.stderr) == (command != "verify")


@pytest.mark.parametrize("command", ["resize", "verify", "merge"])
def test_nan_is_said_without_options_that_the_command_lacks(command, base, tuned, tmp_path):
    adapter = lora(tmp_path / "adapter", {Q: (24, 24)})
    spoilt = adapter / "adapter_model.safetensors" if command != "verify" else tuned / "model.safetensors"
    state = load_file(spoilt)
    state[next(name for name in state if "q_proj" in name)][0, 0] = torch.nan
    save_file(state, spoilt, metadata={"format": "pt"})
    given = {"resize": (adapter, "--rank", 1), "merge": (base, adapter), "verify": (base, tuned, adapter)}[command]
    done = run(command, *given, *([] if command == "verify" else ["-o", tmp_path / "out"]), "--quiet")
    assert done.exit_code == 2
    assert "NaN" in done.stderr
    assert "--exclude" not in done.stderr


@pytest.mark.parametrize("extras", ["none", "bias", "all"])
def test_a_report_does_not_advise_what_was_done(extras, tmp_path):
    """A bare parameter beside modules with factors: PEFT stores modules whole, so that --extras all leaves it out."""
    names = {f"blocks.{i}.mixer.{part}.q_proj.weight": (6, 6) for i in range(2) for part in ("attn", "more")}
    names |= {f"blocks.{i}.mixer.A_log": (6,) for i in range(2)} | {f"blocks.{i}.norm.weight": (6,) for i in range(2)}
    generator = torch.Generator().manual_seed(2)
    sides = []
    for side in ("base", "tuned"):
        state = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
        sides.append(write(tmp_path / side, state, {"model_type": "unheard_of"}))
    done = run("extract", *sides, "--rank", 2, "--extras", extras, "-o", tmp_path / "out", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout).values()
    reasons = {row["tensor"]: row["reason"] for row in report["not_carried"]}
    inside = reasons["blocks.0.mixer.A_log"]
    if extras == "all":
        assert inside.startswith("PEFT stores modules whole, and 'blocks.0.mixer' has factors for 'blocks.0.mixer.")
        assert set(reasons) == {"blocks.0.mixer.A_log", "blocks.1.mixer.A_log"}
        assert not any("--extras" in reason for reason in reasons.values())
    else:
        assert inside == "a vector: --extras all"
        assert reasons["blocks.0.norm.weight"] == "a norm: --extras all"


def test_empty_matrices_are_said_to_be_empty(base, tmp_path):
    state = {n: w if w.ndim == 1 else torch.empty(0) for n, w in random_state(LLAMA, seed=1).items()}
    empty = write(tmp_path / "empty", state, LLAMA.config)
    done = run("extract", base, empty, "--rank", 2, "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 2
    assert "stores it empty, with shape (0,)" in done.stderr
    assert "stage3_gather_16bit_weights_on_model_save" in done.stderr
