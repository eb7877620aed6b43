"""Mistakes in data, options and models: each one sentence, and before any weight is read."""

from __future__ import annotations

import math
import shutil

import pytest
import safetensors.torch
import torch

import deltaspec
from deltaspec.errors import CheckpointError, DeltaspecError, OptionError
from deltaspec.files import tensor_reader
from deltaspec.io import pickled
from deltaspec.options import DataOptions, Recipe, TargetOptions
from deltaspec.workflows.training import prepare_model
from deltaspec.workflows.training.train import train
from tests.workflows.training.train_case import TASKS, run, write_case, write_classes

TIED = {"model": "tied", "run": {"save": "full"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "bert", "llama", "tied")


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever reads a tensor fails: of the model, by its name or by the way to all files of tensors."""

    def refuse(*_args, **_given):
        pytest.fail("weights were read")

    for room, name in (
        *((prepare_model, name) for name in ("load_model", "read_state")),
        *((room, "load_tensor") for room in (tensor_reader, pickled)),
        *((safetensors.torch, name) for name in ("load", "load_file")),
        (torch, "load"),
    ):
        monkeypatch.setattr(room, name, refuse)


def test_the_guard_sees_weights_that_are_read(root, tmp_path, no_weights):
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        run(root, tmp_path / "out")
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        tensor_reader.load_tensor(None)


def rewrite(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("", {}, "empty"),
        ("text,label\n", {}, "no rows"),
        ("text,label\nthe cat,a\nthe dog,a\n", {}, "one class"),
        ("text,kind\nthe cat,a\nthe dog,b\n", {}, "'label'"),
        (f"text,label\n{'the ' * 99},a\n" + "the dog,b\n" * 9 + "the cat,a\n" * 9, {}, "101 tokens"),
        (None, {"method_options": {"rank": 99}}, "--rank is 99"),
        (None, {"targets": TargetOptions("nothing")}, "--targets has 'nothing'"),
        (None, {"targets": TargetOptions("all", depths="7")}, "--depths is '7'"),
        (None, {"method": "unheard"}, "--method is 'unheard'"),
        (None, {"method_options": {"colour": 1}}, "'colour' does not belong"),
        (None, {"method": "full", "targets": TargetOptions("all")}, "--targets.* do not belong to --method full"),
        (None, {"data_options": DataOptions(length=100)}, "--length is 100"),
        (None, {"method": "series", "run": {"save": "full"}}, "--save full merges"),
        (None, TIED | {"targets": TargetOptions("embed")}, "merge into 'model.embed_tokens.weight', which is 'lm_head"),
        (None, TIED | {"targets": TargetOptions("all,lm_head")}, "merge into 'lm_head.weight', which is 'model.embed"),
        (None, {"method": "prefix", "model": "llama", "run": {"gradient_checkpointing": True}}, "keeps no keys"),
    ],
)
def test_mistakes_are_told_before_any_weight_is_read(root, tmp_path, no_weights, text, given, said):
    data = {"data": rewrite(tmp_path / "data.csv", text)} if text is not None else {}
    with pytest.raises(DeltaspecError, match=said):
        run(root, tmp_path / "out", **data, **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("text,label\n" + "the cat,\nthe dog,b\n" * 9, {}, "Row 1 .* has none under 'label'"),
        ("text,label\nthe cat\n" + "the dog,b\n" * 9, {}, "Line 2 .* has 1 columns"),
        ("text,label\n" + "the cat,a\nthe dog,b\n" * 9, {}, "too few .*to hold out"),
        (b"\xff\xfe\x00text", {}, "not UTF-8"),
        (None, {"data": "gone.csv"}, "there is no such file"),
        (None, {"forget": "gone.csv"}, "there is no such file"),
        (None, {"forget": "one.csv"}, "one.csv' has one class only"),
        (None, {"eval_data": "one.csv"}, "'same'"),
        (None, {"data_options": DataOptions(text="{text} {more}")}, "no column 'more'"),
        (None, {"targets": TargetOptions("[")}, "nor a regular expression"),
        (None, {"method": "vblora", "method_options": {"vector_length": 128}}, "--vector-length is 128"),
        (None, {"method": "lora_xs", "method_options": {"rank": 99}}, "--rank is 99"),
        (None, {"method": "last_layers", "method_options": {"blocks": 9}}, "--blocks is 9"),
        (None, {"method": "compacter", "method_options": {"factors": 5}}, "--factors is 5"),
        (None, {"run": {"device": "cuda:99"}}, "--device is 'cuda:99'"),
        (None, {"rates": [1e-3], "data_options": DataOptions(holdout=0)}, "best is told by held-out data"),
        (None, {"model": "unsaid"}, "Cannot open"),
        (None, {"model": "wordless"}, "it knows no words"),
        (None, {"model": "weightless"}, "Cannot open .*expected .safetensors"),
    ],
)
def test_more_of_them(root, tmp_path, no_weights, text, given, said):
    """Names of files are looked up beside data.csv."""
    (root / "one.csv").write_text("text,label\nthe cat,same\nthe dog,same\n", encoding="utf-8")
    for name, missing in (("wordless", "tokenizer*"), ("weightless", "model.safetensors")):
        shutil.copytree(root / "bert", root / name, ignore=shutil.ignore_patterns(missing), dirs_exist_ok=True)
    if isinstance(text, bytes):
        (tmp_path / "data.csv").write_bytes(text)
    found = {name: root / value if str(value).endswith(".csv") else value for name, value in given.items()}
    if text is not None:
        found["data"] = rewrite(tmp_path / "data.csv", text) if isinstance(text, str) else tmp_path / "data.csv"
    with pytest.raises(DeltaspecError, match=said) as caught:
        run(root, tmp_path / "out", **found)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_models_that_cannot_learn_the_task(root, tmp_path):
    with pytest.raises(CheckpointError, match="reads texts in both directions"):
        run(root, tmp_path / "out", data_options=TASKS["llama"][1], data=root / "text.txt")
    data = write_classes(tmp_path / "more.csv", names=("pos", "neg", "new"))
    with pytest.raises(CheckpointError, match="has the class 'new'"):
        run(root, tmp_path / "out", eval_data=data)
    assert math.isfinite(run(root, tmp_path / "out", eval_data=root / "data.csv")["results"]["learned"]["loss"])


def test_a_recipe_without_data_is_for_counting_alone(root, tmp_path):
    with pytest.raises(OptionError, match=r"nothing to train on: pass a Recipe with sources"):
        train(root / "bert", tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_a_call_as_of_0_1_0_says_how_it_is_written_now(tmp_path):
    for call in (
        lambda: deltaspec.train("base", "train.csv", tmp_path / "out"),
        lambda: deltaspec.count("base", "lora"),
    ):
        with pytest.raises(OptionError, match=r"Expected a deltaspec\.Recipe, found .*since 0\.2\.0"):
            call()
