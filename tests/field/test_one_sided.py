"""Blocks without a counterpart are no footnote: a line, their share, exit code 1 unless --partial is given."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import deltaspec
from deltaspec.cli.main import cli
from tests.families import write

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}


def model(layers=4, seed=0, prefix="model."):
    g = torch.Generator().manual_seed(seed)
    shapes = {f"{prefix}embed_tokens.weight": (20, 8), f"{prefix}norm.weight": (8,), "lm_head.weight": (20, 8)}
    for i in range(layers):
        roles = {f"self_attn.{role}_proj": (8, 8) for role in "qkvo"} | {
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }
        shapes |= {f"{prefix}layers.{i}.{role}.weight": shape for role, shape in roles.items()}
        shapes |= {f"{prefix}layers.{i}.input_layernorm.weight": (8,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def call(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


def folders(tmp_path, base, tuned):
    return write(tmp_path / "base", base, CONFIG), write(tmp_path / "tuned", tuned, CONFIG)


def share(state, words):
    inside = sum(tensor.numel() for name, tensor in state.items() if any(word in name for word in words))
    return inside / sum(tensor.numel() for tensor in state.values())


def test_a_truncated_fine_tune_is_told_and_ends_in_exit_code_1(tmp_path):
    base = model()
    pair = folders(tmp_path, base, model(2, seed=1))
    part = share(base, ["layers.2.", "layers.3."])
    line = f"Warning: 2 blocks of the base (model.layers.2, …; {100 * part:.3g} % of its parameters) without a"
    out = tmp_path / "out"
    for name, command in (("r", "analyze"), ("a", "extract")):
        said = call(command, *pair, "-o", out / name, "--quiet", code=1)
        assert line in said
        assert "Incomplete: 2 blocks have no counterpart; pass --partial" in said
        assert line in call(command, *pair, "-o", out / f"{name}2", "--quiet", "--partial")
    assert line in call("show", out / "r")
    assert line in call("verify", *pair, out / "a", "--quiet", code=1)
    call("verify", *pair, out / "a", "--quiet", "--partial")
    assert deltaspec.Run.load(out / "r").one_sided == [
        {"side": "base", "blocks": 2, "share": pytest.approx(part), "example": "model.layers.2"}
    ]
    assert "Kept of ‖Δ‖² of what both models hold: " in call("extract", *pair, "-o", out / "b", "--quiet", code=1)
    report = json.loads((out / "a" / "deltaspec.json").read_text())
    assert report["one_sided"] == deltaspec.Run.load(out / "r").one_sided
    assert "the change of what both models hold (not counted" in (out / "a" / "README.md").read_text()
    assert line in call("analyze", *pair, "--dry-run")
    said = call("analyze", *pair, "-o", out / "j", "--quiet", "--json", code=1)
    assert json.loads(said.splitlines()[0])["manifest"]["one_sided"]


def test_a_finished_run_says_it_again(tmp_path):
    pair = folders(tmp_path, model(), model(2, seed=1))
    for _ in range(2):
        assert "Incomplete" in call("analyze", *pair, "-o", tmp_path / "r", "--quiet", code=1)


def test_both_sides_and_layers_from_the_middle(tmp_path):
    """A layer-pruned fine-tune that has a new tower."""
    tuned = {n: t for n, t in model(seed=1).items() if "layers.1." not in n}
    tuned |= model(3, seed=2, prefix="vision_tower.encoder.")
    found = deltaspec.analyze(*folders(tmp_path, model(), tuned), tmp_path / "r").one_sided
    assert [(row["side"], row["blocks"], row["example"]) for row in found] == [
        ("base", 1, "model.layers.1"),
        ("tuned", 3, "vision_tower.encoder.layers.0"),
    ]
    assert found[1]["share"] == pytest.approx(share(tuned, ["encoder.layers."]))


def test_several_checkpoints_of_a_training(tmp_path):
    base, whole = write(tmp_path / "base", model(), CONFIG), write(tmp_path / "step-1", model(seed=1), CONFIG)
    half = write(tmp_path / "step-2", model(2, seed=2), CONFIG)
    args = "analyze", base, whole, half, "-o", tmp_path / "t", "--quiet"
    assert "Warning: 2 blocks of the base" in call(*args, code=1)
    call(*args, "--partial")


HARMLESS = {
    "a task head": {"score.weight": (3, 8), "score.bias": (3,)},
    "a head of two layers": {"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (2, 8)},
    "a numbered head": {"classifier.0.weight": (8, 8), "classifier.2.weight": (2, 8)},
    "rotary buffers": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (2,) for i in range(4)},
    "masks": {f"model.layers.{i}.self_attn.bias": (1, 1, 4, 4) for i in range(4)},
    "a lone tensor in every layer": {f"model.layers.{i}.self_attn.g_proj.weight": (8, 8) for i in range(4)},
    "norms of a block more": {"model.layers.9.a_norm.weight": (8,), "model.layers.9.b_norm.weight": (8,)},
}


@pytest.mark.parametrize("what", HARMLESS)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_what_is_no_block_is_a_footnote(what, side, tmp_path):
    states = {"base": model(), "tuned": model(seed=1)}
    states[side] |= {name: torch.ones(shape) for name, shape in HARMLESS[what].items()}
    said = call("analyze", *folders(tmp_path, **states), "-o", tmp_path / "r", "--quiet")
    assert "Warning" not in said
    assert "Left out" in said


def test_what_the_options_keep_out_is_not_missed(tmp_path):
    pair = folders(tmp_path, model(), model(2, seed=1))
    call("analyze", *pair, "-o", tmp_path / "r", "--quiet", "--exclude", r"layers\.[23]\.")
    other = folders(tmp_path / "o", model(2), model(seed=1))
    call("analyze", *other, "-o", tmp_path / "s", "--quiet", "--include", r"layers\.[01]\.|embed|norm")


def test_pruned_experts_are_blocks(tmp_path):
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.{role}.weight": torch.randn(6, 8)
        for i in range(2)
        for e in range(4)
        for role in ("gate_proj", "up_proj")
    }
    tuned = {name: tensor + 0.1 for name, tensor in experts.items() if "experts.3" not in name}
    found = deltaspec.analyze(*folders(tmp_path, model() | experts, model(seed=1) | tuned), tmp_path / "r").one_sided
    assert [(row["blocks"], row["example"]) for row in found] == [(2, "model.layers.0.mlp.experts.3")]


def test_an_adapter_that_leaves_layers_alone_is_whole(tmp_path):
    base, _ = folders(tmp_path, model(), model(2, seed=1))
    tuned = {n: t + (0.1 if "layers.0" in n and "q_proj" in n else 0) for n, t in model().items()}
    deltaspec.extract(base, write(tmp_path / "one", tuned, CONFIG), tmp_path / "a")
    call("analyze", base, tmp_path / "a", "-o", tmp_path / "r", "--quiet")
