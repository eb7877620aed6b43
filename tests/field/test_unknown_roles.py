"""Models of no known family: "by module type" says what each module is called, in every table, figure and report."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from deltaspec.architecture.match import identify
from deltaspec.architecture.roles import MOST, ROLES, group_rare, order_roles, own_role
from deltaspec.cli.main import cli
from deltaspec.store.run import Run
from tests.families import write

CONFIG = {"model_type": "unheard_of"}
LAYERS = 3
HOSTILE = ("\x1b[31mred", "$\\frac", "_private", "W1,W2", "long" * 30, "W10", "W2", "=SUM(1)")


def run(*arguments):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def make_pair(folder, names, shape=(8, 6)):
    """Write a base and a fine-tune with one matrix for each name in each block; returns them and their states."""
    generator = torch.Generator().manual_seed(1)
    full = [f"blocks.{layer}.mixer.{name}.weight" for layer in range(LAYERS) for name in names]
    base = {name: torch.randn(shape, generator=generator) for name in full}
    tuned = {name: weight + 0.1 * torch.randn(shape, generator=generator) for name, weight in base.items()}
    return write(folder / "base", base, CONFIG), write(folder / "tuned", tuned, CONFIG), base, tuned


def read_records(folder):
    return [record.to_dict() for record in Run.load(folder).records]


def rows_of(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_a_table_by_role_has_a_row_for_each_name_with_its_own_median(tmp_path):
    base, tuned, before, after = make_pair(tmp_path, ("W1", "W_out", "in_proj"))
    done = run("analyze", base, tuned, "-o", tmp_path / "run", "--quiet")
    table = rows_of(done.stdout)
    for role in ("W1", "W_out", "in_proj"):
        names = [name for name in before if f".{role}." in name]
        sides = [(before[name].double().numpy(), after[name].double().numpy()) for name in names]
        relative = np.median([np.linalg.norm(new - old) / np.linalg.norm(old) for old, new in sides])
        assert table[role][1:3] == [str(LAYERS), f"{relative:.3g}"]
    said = [line for line in done.stdout.splitlines() if "no known family" in line]
    assert said == [
        "Note: 9 of 9 matrices are in no known family: taken for what their modules are called (for example "
        "'blocks.0.mixer.W1.weight' for W1 of block 0)."
    ]
    records = read_records(tmp_path / "run")
    assert {(record["role"], record["depth"]) for record in records} == {
        (role, depth) for role in ("W1", "W_out", "in_proj") for depth in range(LAYERS)
    }


def test_figures_and_tables_take_any_name_and_print_no_control_character(tmp_path):
    base, tuned, *_ = make_pair(tmp_path, HOSTILE)
    shown = run("analyze", base, tuned, "-o", tmp_path / "run", "--quiet").stdout
    run("plot", tmp_path / "run")
    with (tmp_path / "run/figures/energy.csv").open(newline="") as file:
        drawn = list(dict.fromkeys(row["role"] for row in csv.DictReader(file)))
    assert drawn == order_roles(HOSTILE)
    assert drawn.index("W2") < drawn.index("W10")
    said = [shown, run("show", tmp_path / "run", "--by", "matrix").stdout]
    made = run("extract", base, tuned, "--rank", 6, "-o", tmp_path / "adapter", "--quiet")
    said += [made.stdout, run("verify", base, tuned, tmp_path / "adapter", "--quiet").stdout]
    said += [run("merge", base, tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet").stdout]
    for text in said:
        assert "_private" in text
        assert all(character.isprintable() or character == "\n" for character in text)


def test_a_merge_of_unknown_modules_is_the_fine_tune(tmp_path):
    base, tuned, _, after = make_pair(tmp_path, ("W1", "W_out"))
    run("extract", base, tuned, "--rank", 6, "-o", tmp_path / "adapter", "--quiet")
    merged = json.loads(run("merge", base, tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet", "--json").stdout)
    assert {row["role"] for row in merged["matrices"]} == {"W1", "W_out"}
    again = run("analyze", tmp_path / "merged", tuned, "-o", tmp_path / "left", "--quiet", "--json").stdout
    scale = max(float(weight.norm()) for weight in after.values())
    assert all(record["frobenius_norm"] < 1e-6 * scale for record in json.loads(again)["records"])


def test_very_many_names_are_one_row_that_says_how_many(tmp_path):
    names = [f"part{number}x" for number in range(MOST + 15)]
    base, tuned, *_ = make_pair(tmp_path, [*names, "q_proj"], shape=(4, 3))
    said = run("analyze", base, tuned, "-o", tmp_path / "run", "--quiet").stdout
    by_role = said.split("\n\n")[0].splitlines()
    assert len(by_role) == 1 + 1 + MOST  # head, q_proj, and what is unknown
    assert by_role[-1].split("  ")[0] == "other (16 names)"
    assert by_role[-1].split()[3] == str(16 * LAYERS)
    run("plot", tmp_path / "run", "--format", "svg")
    with (tmp_path / "run/figures/rank_by_depth.csv").open(newline="") as file:
        drawn = {row["role"] for row in csv.DictReader(file)}
    assert len(drawn) == 1 + MOST
    records = read_records(tmp_path / "run")
    assert {record["role"] for record in records} == {*names, "q_proj"}  # data keep every name
    certificate = run("extract", base, tuned, "--rank", 2, "-o", tmp_path / "adapter", "--quiet").stdout
    assert "other (16 names)" in certificate


def test_grouping_keeps_the_most_frequent_and_is_done_once():
    counts = {f"W{number}": number for number in range(MOST + 5)} | {"other": 9, "q_proj": 1}
    shown = group_rare(counts)
    rare = {role for role, listed in shown.items() if role != listed}
    assert rare == {f"W{number}" for number in range(6)}
    assert {shown[role] for role in rare} == {"other (6 names)"}
    assert (shown["q_proj"], shown["other"]) == ("q_proj", "other")
    again = group_rare(dict.fromkeys(shown.values(), 1))
    assert again == {role: role for role in shown.values()}
    few = {f"W{number}": 1 for number in range(MOST)}
    assert group_rare(few) == {role: role for role in few}


@pytest.mark.parametrize(
    ("tensor", "role"),
    [
        ("blocks.0.experts.3.lin_v.weight", "lin_v"),
        ("blocks.0.experts.thing", "thing"),  # a stack
        ("blocks.0.experts.weight", "experts"),
        ("net.2.weight", "net"),
        ("conv.weight_g", "other"),  # a name of the vocabulary means more than it is known to be
        ("gate_fn.weight_v", "gate_fn"),
        ("gate_fn.parametrizations.weight.original1", "gate_fn"),
        ("rnn.weight_ih_l0", "weight_ih_l0"),
        ("0.1.2", "other"),
        ("weight", "weight"),
        ("aux.norm.weight", "other"),
        ("", "other"),
    ],
)
def test_the_name_is_the_modules_own(tensor, role):
    assert own_role(tensor) == role


@pytest.mark.parametrize(
    ("kind", "sizes", "roles"),
    [
        ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}, {"in_proj", "x_proj", "dt_proj"}),
        ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}, {"receptance", "output"}),
        ("ctrl", {"n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2}, {"Wq", "Wk", "Wv"}),
    ],
)
def test_architectures_of_transformers_have_roles_of_their_own(kind, sizes, roles):
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = identify(shapes, config.to_dict())
    unknown = {}
    for name, matrices in found.matrices.items():
        unknown |= {matrix.key.role: name for matrix in matrices if matrix.key.role not in ROLES}
    assert roles <= unknown.keys()
    assert all(role in name.split(".") for role, name in unknown.items())
