"""Counting: what papers publish, from configs alone; and what a real attachment holds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options import Recipe, TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.targets import list_left_out
from deltaspec.workflows.shared.meta_models import build_skeleton, describe_skeleton, list_head
from deltaspec.workflows.training.count import (
    choose_method_sites,
    count,
    count_parameters,
    describe_left_out,
    make_options,
)
from tests.io.test_hub import COMMIT, Hub
from tests.tiny_models import build

PUBLISHED = tomllib.loads((Path(__file__).parents[2] / "published_counts.toml").read_text(encoding="utf-8"))
SMALL = {  # method → options that a model of width 16 can take
    "lora": {"rank": 2},
    "vblora": {"rank": 2, "vectors": 5, "vector_length": 8},
    "vera": {"rank": 3},
    "tied": {"rank": 2},
    "lora_xs": {"rank": 2},
    "last_layers": {"blocks": 1},
    "series": {"bottleneck": 3, "norm": True},
    "parallel": {"bottleneck": 3},
    "compacter": {"factors": 2, "reduction": 2},
}


def write(folder, config, **settings):
    """A config.json as transformers writes it, and nothing else."""
    getattr(transformers, config)(**settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The published models' configs, each in a folder."""
    folder = tmp_path_factory.mktemp("configs")
    return {
        name: write(folder / name, **{key: value for key, value in settings.items() if key not in ("task", "labels")})
        for name, settings in PUBLISHED["models"].items()
    }


@pytest.fixture(scope="module")
def skeletons(configs):
    """The published models without weights, each made once."""

    @functools.cache
    def make(name):
        settings = PUBLISHED["models"][name]
        kind = describe_skeleton(configs[name], task=settings.get("task", ""), labels=settings.get("labels", 0))
        return build_skeleton(kind)

    return make


@pytest.mark.parametrize(
    "row", PUBLISHED["rows"], ids=lambda row: f"{row['model']}-{row['method']}-{row.get('targets', '')}"
)
def test_published_counts(row, skeletons):
    model, method = skeletons(row["model"]), row["method"]
    targets = TargetOptions(row.get("targets", ""), split=row.get("split", False))
    sites = choose_method_sites(model, method, targets)
    attachment = METHODS[method].attach(
        model, sites, make_options(method, row.get("options", {})), name="default", seed=0
    )
    counts = count_parameters(model, attachment)
    attachment.detach()
    assert sum(role.trainable for role in counts.roles) == counts.trainable
    expected = {what: row[what] for what in ("trainable", "stored", "total") if what in row}
    assert expected == {what: getattr(counts, what) for what in expected} != {}


PAIRS = [(name, method) for name in ("tied", "gpt2", "classifier", "t5") for method in METHODS]
NO_BIASES = [(name, "bitfit") for name in ("tied", "t5")]


@pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if pair not in NO_BIASES])
def test_a_count_from_a_config_is_what_is_attached(name, method, tmp_path):
    """Tied embeddings count once; the oracle is a model with values and what torch says of its parameters."""
    model = build(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    counts = count(tmp_path, Recipe(method=method, method_options=SMALL.get(method, {})))

    head = {id(p) for p in list_head(model).values()}
    sites = choose_method_sites(model, method, TargetOptions())
    model.requires_grad_(False)
    attachment = METHODS[method].attach(model, sites, make_options(method, SMALL.get(method, {})), name="a", seed=0)
    everything = {id(p): p for p in [*model.parameters(), *attachment.trained().values()]}
    trained = [p for p in everything.values() if p.requires_grad]
    own = {id(p) for p in attachment.trained().values()}
    assert {id(p) for p in trained} == own
    assert counts.trainable == sum(p.numel() for p in trained)
    assert counts.head == sum(everything[i].numel() for i in head - own)
    assert counts.total == sum(p.numel() for p in everything.values())
    assert counts == count_parameters(model, attachment)
    released = sum(t.numel() * t.element_size() for t in attachment.released().values())
    if method != "vblora":
        assert counts.bytes["stored"] == released
    assert sum(role.trainable for role in counts.roles) == counts.trainable


@pytest.mark.parametrize("name", ["gpt2-large", "distilbert", "whisper-large-v2", "gemma-7b"])
def test_a_published_count_from_the_config(name, configs):
    row = next(row for row in PUBLISHED["rows"] if row["model"] == name and "trainable" in row)
    targets, given = TargetOptions(row.get("targets", ""), split=row.get("split", False)), PUBLISHED["models"][name]
    task = {key: given[key] for key in ("task", "labels") if key in given}
    found = count(
        configs[name], Recipe(method=row["method"], method_options=row.get("options", {}), targets=targets), **task
    )
    assert (found.trainable, found.total) == (row["trainable"], row.get("total", found.total))


MOE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
EXPERTS = {
    "MixtralForCausalLM": {"num_local_experts": 3, "intermediate_size": 24},
    "GptOssForCausalLM": {"num_local_experts": 3, "intermediate_size": 24, "head_dim": 8},
    "Qwen2MoeForCausalLM": {
        "num_experts": 3,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "mlp_only_layers": [0],
        "intermediate_size": 24,
    },
}


@pytest.mark.parametrize("name", EXPERTS)
def test_no_matrix_of_the_blocks_is_left_out_without_a_word(name):
    """Stacks of experts, and what lies beside layers, are listed: of the blocks' matrices sites and list hold all."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(**MOE, **EXPERTS[name]))
    held = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim > 1 and ".layers." in n}
    held = {n: shape for n, shape in held.items() if not n.endswith("_bias")}  # experts' biases, stacked
    sites = {site.key.tensor for site in choose_method_sites(model, "lora", TargetOptions("all"))}
    left = {one.tensor: one.shape for one in list_left_out(model, TargetOptions("all"))}
    assert left == {n: shape for n, shape in held.items() if n not in sites}
    assert sum(".mlp.experts." in n and len(shape) == 3 for n, shape in left.items()) == (2 if "Qwen" in name else 4)
    mlp = {one.tensor for one in list_left_out(model, TargetOptions("mlp", depths="1"))}
    assert mlp == {f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")}
    assert list_left_out(model, TargetOptions("attention,embed")) == []


def test_a_model_all_of_experts_has_no_mlp_to_adapt(tmp_path):
    write(tmp_path, "MixtralConfig", **MOE, **EXPERTS["MixtralForCausalLM"])
    for targets in ("mlp", "attention,down_proj", ".*experts.*"):
        with pytest.raises(OptionError, match=r"experts\.(gate_up|down)_proj' \(3 × .* stacked in one parameter"):
            count(tmp_path, Recipe(method_options={"rank": 2}, targets=TargetOptions(targets)))
    counts = count(tmp_path, Recipe(method_options={"rank": 2}))
    assert {role.role for role in counts.roles} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    missed = 2 * (3 * 48 * 16 + 3 * 16 * 24 + 3 * 16)
    said = describe_left_out(counts.left_out)
    assert said.startswith(f"Left out: {missed:,} parameters, in ")
    assert "layers.*.mlp.experts.gate_up_proj (2 of 3 × 48 × 16), " in said
    assert said.count("\n") == 0
    assert count(tmp_path, Recipe(method="full")).left_out == ()


def test_vblora_stored_is_the_smallest_release():
    """Four bytes to a number: k-1 weights and k indices of two bytes for each piece, and the bank."""
    model = build("tied")
    options = make_options("vblora", {"rank": 2, "vectors": 300, "vector_length": 8, "topk": 3, "save_topk": True})
    sites = choose_method_sites(model, "vblora", TargetOptions())
    attachment = METHODS["vblora"].attach(model, sites, options, name="a", seed=0)
    released = sum(t.numel() * t.element_size() for t in attachment.released().values())
    assert count_parameters(model, attachment).bytes["stored"] == released


def test_a_head_is_apart_and_a_task_chooses_the_class(tmp_path):
    write(tmp_path, "DistilBertConfig", dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    bare = count(tmp_path, Recipe(method_options={"rank": 2}))
    classifier = count(tmp_path, Recipe(method_options={"rank": 2}), task="classification", labels=5)
    assert (bare.model, bare.head) == ("DistilBertModel", 0)
    assert classifier.head == (16 * 16 + 16) + (5 * 16 + 5)
    assert classifier.total - bare.total == classifier.head
    assert classifier.trainable == bare.trainable
    assert count(tmp_path, Recipe(method="full"), task="classification").head == 0  # it is among the trained
    config = tmp_path / "other.json"
    config.write_bytes((tmp_path / "config.json").read_bytes())
    assert count(config, Recipe(method_options={"rank": 2})) == bare  # a file does as well, by any name
    (tmp_path / "model.safetensors").touch()
    assert count(tmp_path / "model.safetensors", Recipe(method_options={"rank": 2})) == bare  # and weights beside it


def test_no_weight_is_read_and_no_code_run(tmp_path):
    """Only config.json is there; a class of the model's own would be code."""
    write(tmp_path, "GPT2Config", n_embd=16, n_layer=2, n_head=2)
    config = json.loads((tmp_path / "config.json").read_text())
    config["_attn_implementation"] = "flash_attention_2"  # not installed, and not needed
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert (
        count(tmp_path, Recipe(method_options={"rank": 4}, targets=TargetOptions("q_proj", "-1"))).trainable == 4 * 32
    )


FETCH = """
from huggingface_hub import constants
from deltaspec.errors import CheckpointError
from deltaspec.workflows.shared.meta_models import open_config
for name in ("name", "name", "other", "offline"):
    constants.HF_HUB_OFFLINE = name == "offline"
    try:
        opened = open_config("owner/" + name)
        print(opened.revision, opened.config["n_embd"])
    except CheckpointError as error:
        print(error)
"""


def test_of_a_model_of_the_hub_only_its_config_is_fetched_and_then_nothing(tmp_path):
    server = Hub(tmp_path / "remote")
    model, other = server.root / "owner" / "name", server.root / "owner" / "other"
    (write(model, "GPT2Config", n_embd=16) / "model.safetensors").write_bytes(b"never read")
    (write(other, "GPT2Config") / "config.json").rename(other / "else.json")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean = {key: value for key, value in clean.items() if "proxy" not in key.lower()}
    own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        command = [sys.executable, "-c", FETCH]
        done = subprocess.run(command, env={**clean, **own}, capture_output=True, text=True, timeout=60, check=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    said = done.stdout.splitlines()
    assert said[:2] == [f"{COMMIT} 16"] * 2
    assert "it has no config.json" in said[2]
    assert "HF_HUB_OFFLINE is set" in said[3]
    assert {path for path in server.asked if "/resolve/" in path} == {"/owner/name/resolve/main/config.json"}
    assert len([path for path in server.asked if path.startswith("/api/models/owner/name")]) == 1


REFUSED = {
    r"no config\.json": ({"ref": "empty"}, CheckpointError),
    "no such file or folder": ({"ref": "nowhere"}, CheckpointError),
    "expected a folder, a JSON file": ({"ref": "text.txt"}, CheckpointError),
    "has no model_type": ({"ref": "typeless"}, CheckpointError),
    "has no model_type 'wonder'": ({"ref": "wonder"}, CheckpointError),
    "Cannot build GPT2Model": ({"ref": "torn"}, CheckpointError),
    "as JSON": ({"ref": "cut.json"}, CheckpointError),
    "expected classification or causal-lm": ({"task": "translation"}, OptionError),
    "--task classification with it": ({"labels": 3}, OptionError),
    "--labels is -1": ({"task": "classification", "labels": -1}, OptionError),
    "'query', which matches no layer: this model has the roles q_proj, k_proj": (
        {"targets": TargetOptions("query")},
        OptionError,
    ),
    "16 × 16: pass 16 or less": ({"method_options": {"rank": 17}, "targets": TargetOptions("o_proj")}, OptionError),
    "--method is 'magic'": ({"method": "magic"}, OptionError),
    "'bottleneck' does not belong to the method lora": ({"method_options": {"bottleneck": 3}}, OptionError),
    "do not belong to --method full": ({"method": "full", "targets": TargetOptions("mlp")}, OptionError),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_counted_is_said_in_a_sentence(said, tmp_path):
    given, error = REFUSED[said]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("{}")
    (tmp_path / "cut.json").write_text('{"model_type": ')
    model = write(tmp_path / "model", "GPT2Config", n_embd=16, n_layer=2, n_head=2)
    config = json.loads((model / "config.json").read_text())
    broken = {"typeless": {"model_type": None}, "wonder": {"model_type": "wonder"}, "torn": {"n_head": 5}}
    for name, change in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    arguments = {"ref": "model", **given}
    ref = tmp_path / arguments.pop("ref")
    named = {name: arguments.pop(name) for name in ("task", "labels") if name in arguments}
    with pytest.raises(error, match=said) as caught:
        count(ref, Recipe(**arguments), **named)
    assert "\n" not in str(caught.value)
