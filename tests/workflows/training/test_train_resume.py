"""Every method, stopped mid-epoch and gone on with, ends with the bytes of a training that never stopped."""

from __future__ import annotations

import pytest

from deltaspec.training.methods import METHODS
from tests.workflows.training.train_case import read_bytes, read_lines, run, write_case

CASES = {  # beside those of test_train
    "dora": ("lora", {"rank": 3, "dora": True, "dropout": 0.2, "lr_ratio": 16.0}),
    "pissa": ("lora", {"rank": 3, "init": "pissa"}),
    "last_layers": ("last_layers", {"blocks": 1}),
    "series": ("series", {}),
    "compacter": ("compacter", {"factors": 2, "reduction": 4}),
    "prefix": ("prefix", {"tokens": 3}),
    "prompt": ("prompt", {"tokens": 3}),
    "vblora": ("vblora", {"rank": 2, "vectors": 9, "vector_length": 8, "save_topk": True}),
    "vera": ("vera", {"rank": 5, "save_projection": False}),
    "tied": ("tied", {"rank": 3}),
    "lora_xs": ("lora_xs", {"rank": 3}),
}
TESTED = {"full", "lora", "bitfit", "parallel"}  # there, or by one of the same kind


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "bert", "llama")


@pytest.mark.parametrize("case", CASES)
def test_every_method_goes_on_bit_for_bit(root, tmp_path, case):
    """Stopped in step 3 of 4 with a checkpoint of step 2, in the middle of an epoch of four batches."""
    method, options = CASES[case]
    model = "llama" if method in ("prefix", "prompt") else "bert"
    loop = {"steps": 4, "batch": 4, "accumulate": 2, "weight_decay": 0.1, "schedule": "cosine"}
    given = {"method": method, "method_options": options, "loop": loop, "run": {"checkpoint_every": 2}}

    def stop(tick):
        if tick.step == 3:
            raise KeyboardInterrupt

    whole = run(root, tmp_path / "whole", model, **given)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "stopped", model, progress=stop, **given)
    seen = []
    report = run(root, tmp_path / "stopped", model, progress=seen.append, **given)
    assert [tick.step for tick in seen] == [3, 4]
    assert read_bytes(tmp_path / "stopped/final") == read_bytes(tmp_path / "whole/final")
    assert read_lines(tmp_path / "stopped") == read_lines(tmp_path / "whole")
    assert report["results"]["learned"] == whole["results"]["learned"]
    losses = [line["loss"] for line in read_lines(tmp_path / "whole") if "loss" in line]
    assert len(set(losses)) == 4


def test_no_method_is_forgotten():
    assert {method for method, _ in CASES.values()} | TESTED == set(METHODS)
