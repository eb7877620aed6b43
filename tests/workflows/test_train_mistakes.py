"""Mistakes in data, options and models: each one sentence, and before any weight is read."""

from __future__ import annotations

import math

import pytest

from deltaspec.errors import CheckpointError, DeltaspecError
from deltaspec.options import DataOptions, TargetOptions
from deltaspec.workflows import train_model
from tests.workflows.train_case import TASKS, run, write_case, write_classes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "bert")


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
    ],
)
def test_mistakes_are_told_before_any_weight_is_read(root, tmp_path, monkeypatch, text, given, said):
    def refuse(*_args, **_given):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(train_model, "load_model", refuse)
    data = {"data": rewrite(tmp_path / "data.csv", text)} if text is not None else {}
    with pytest.raises(DeltaspecError, match=said):
        run(root, tmp_path / "out", **data, **given)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_learn_the_task(root, tmp_path):
    with pytest.raises(CheckpointError, match="reads texts in both directions"):
        run(root, tmp_path / "out", data_options=TASKS["llama"][1], data=root / "text.txt")
    data = write_classes(tmp_path / "more.csv", names=("pos", "neg", "new"))
    with pytest.raises(CheckpointError, match="has the class 'new'"):
        run(root, tmp_path / "out", eval_data=data)
    assert math.isfinite(run(root, tmp_path / "out", eval_data=root / "data.csv")["results"]["learned"]["loss"])
