"""``deltaspec count``, and the flags of every method, which must be the methods' own options."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import transformers
from click.testing import CliRunner

from deltaspec.cli.count import count
from deltaspec.cli.main import cli
from deltaspec.cli.methods import HELP, TAKEN, parse_method
from deltaspec.errors import OptionError
from deltaspec.options import training
from deltaspec.options.methods import METHOD_OPTIONS
from deltaspec.training import methods

KINDS = {"int": int, "float": float, "str": str, "bool": bool}


@pytest.fixture
def invoke(monkeypatch):
    """Run the command as a user does, exit codes too."""
    monkeypatch.setattr("deltaspec.cli.main.COMMANDS", {"count": "Count."})
    return lambda *arguments: CliRunner().invoke(cli, ["count", *map(str, arguments)])


@pytest.fixture
def distilbert(tmp_path):
    transformers.DistilBertConfig().save_pretrained(tmp_path)
    return tmp_path


def test_flags_are_the_methods_own_options():
    """Patterns and the like, which no flag can say, are for Python."""
    own = {
        name: {field.name: KINDS[field.type] for field in fields(method.options) if field.type in KINDS}
        for name, method in methods.METHODS.items()
    }
    assert own == TAKEN
    assert {name: method.options for name, method in methods.METHODS.items()} == METHOD_OPTIONS
    assert set(HELP) == {name for known in TAKEN.values() for name in known}


def test_no_flag_of_a_method_is_one_of_training():
    """Both are flags of ``train``."""
    options = (training.TargetOptions, training.DataOptions, training.LoopOptions, training.RunOptions)
    assert not set(HELP) & {field.name for kind in options for field in fields(kind)}


def test_what_the_user_gave_and_no_more():
    given = dict.fromkeys(HELP) | {"method": "series", "bias": "no", "norm": True, "mine": 3}
    assert parse_method(given) == ("series", {"norm": True, "bias": False})
    assert given == {"mine": 3}
    with pytest.raises(OptionError, match=r"--bias is 'all': --method series expects yes or no\."):
        parse_method({"method": "series", "bias": "all"})
    assert parse_method({"method": "lora", "bias": "all"}) == ("lora", {"bias": "all"})


def test_json_and_table_agree_with_what_is_published(invoke, distilbert):
    """DistilBERT with two classes: 66,955,010 in all, of which its head has 592,130."""
    arguments = (distilbert, "--task", "classification", "--labels", 2, "--rank", 8, "--targets", "q_proj,v_proj")
    counts = json.loads(invoke(*arguments, "--json").stdout)
    assert (counts["trainable"], counts["head"], counts["stored"]) == (147_456, 592_130, 147_456)
    assert counts["total"] == 66_955_010 + 147_456
    assert counts["bytes"] == {"stored": 589_824, "head": 2_368_520, "optimizer": 8 * (147_456 + 592_130)}
    assert [(role["role"], role["matrices"], role["trainable"]) for role in counts["roles"]] == [
        ("q_proj", 6, 73_728),
        ("v_proj", 6, 73_728),
    ]
    lines = invoke(*arguments).stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["role", "matrices", "shape", "trainable"],
        ["q_proj", "6", "768", "×", "768", "73,728"],
        ["v_proj", "6", "768", "×", "768", "73,728"],
    ]
    assert lines[4].split()[:3] == ["trainable", "147,456", "0.2197%"]
    assert lines[6].split()[:4] == ["stored", "147,456", "590", "kB"]
    assert counts["left_out"] == []
    assert lines[7].split() == ["total", "67,102,466", "DistilBertForSequenceClassification"]


def test_vblora_says_what_a_release_without_topk_holds(invoke, distilbert):
    """Bank and all logits: h (b + r Σ (m + n) / b)."""
    arguments = (distilbert, "--method", "vblora", "--targets", "q_proj", "--vectors", 90, "--rank", 4)
    whole = 90 * (256 + 4 * 6 * (768 + 768) // 256)
    assert f"released without it, it holds {whole:,}." in invoke(*arguments).stdout
    assert json.loads(invoke(*arguments, "--json").stdout)["released"] == whole
    short = json.loads(invoke(*arguments, "--save-topk", "--json").stdout)
    assert short["released"] == short["stored"] < whole
    assert "Note" not in invoke(*arguments, "--save-topk").stdout


def test_experts_that_are_left_out_are_named(invoke, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=3).save_pretrained(tmp_path)
    last = invoke(tmp_path, "--rank", 2).stdout.splitlines()[-1]
    assert last.startswith("Left out: ")
    assert "layers.*.mlp.experts.down_proj (2 of 3 × 16 × 24): experts stacked in one parameter" in last
    left = json.loads(invoke(tmp_path, "--rank", 2, "--json").stdout)["left_out"]
    assert {"tensor": "layers.1.mlp.experts.down_proj", "shape": [3, 16, 24]}.items() <= left[-1].items()
    assert "Left out" not in invoke(tmp_path, "--rank", 2, "--targets", "attention").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bottleneck", 3], "--bottleneck does not belong to --method lora: it takes --rank, --alpha"),
        (["--method", "full", "--rank", 3], "--rank does not belong to --method full: it has no options."),
        (["--method", "magic"], "--method is 'magic': expected one of full, "),
        (["--targets", "wonder"], "this model has the roles q_proj, "),
        (["--targets", "q_lin$"], "must match a whole path such as 'transformer.layer.0.attention.q_lin'"),
        (["--rank", 999], "--rank is 999, but 'transformer.layer.0.attention.q_lin' is 768 × 768"),
        (["--depths", "first"], "--depths has 'first'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, said, invoke, distilbert):
    result = invoke(distilbert, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_package_is_named(invoke, distilbert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke(distilbert)
    assert result.exit_code == 2
    assert "needs the package 'transformers'" in result.stderr


def test_help_needs_no_torch():
    code = "import sys; from deltaspec.cli.count import count; count(['--help'], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], capture_output=True, text=True, check=True
    )
    assert all(f"--{name.replace('_', '-')}" in done.stdout for name in HELP)
    assert count.name == "count"
