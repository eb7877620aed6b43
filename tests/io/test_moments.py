"""Files of moments: round trip, and every lie in a header."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deltaspec.errors import CheckpointError, NumericalError
from deltaspec.io.moments import is_empty, open_moments, write_moments, write_part
from tests.io.files import write_raw

ABOUT = {"model": {}, "text": {}, "tokens": 7, "options": {}, "aliases": {"b": "a"}, "left_out": []}


@pytest.mark.parametrize("side", [1, 2, 511, 512, 513])
def test_round_trip_is_float32_and_symmetric(tmp_path, side):
    x = np.random.default_rng(side).standard_normal((30, side))
    dense = x.T @ x
    write_part(tmp_path / "part", torch.from_numpy(np.triu(dense)))
    write_moments(tmp_path / "m.safetensors", {"a": tmp_path / "part"}, ABOUT)
    moments = open_moments(tmp_path / "m.safetensors")
    assert (moments.tensors["a"].shape, moments.names, moments.about) == ((side * (side + 1) // 2,), ("a", "b"), ABOUT)
    for name in ("a", "b"):
        assert np.array_equal(moments.get(name).numpy(), dense.astype(np.float32).astype(np.float64))
    assert moments.get("c") is None


def test_a_layer_that_saw_only_zeros_is_empty(tmp_path):
    write_part(tmp_path / "part", torch.zeros(3, 3, dtype=torch.float64))
    assert is_empty(tmp_path / "part")
    write_part(tmp_path / "part", torch.ones(3, 3, dtype=torch.float64))
    assert not is_empty(tmp_path / "part")


def test_what_float32_cannot_hold_is_refused(tmp_path):
    with pytest.raises(NumericalError, match="exceed float32"):
        write_part(tmp_path / "part", torch.full((2, 2), 1e39, dtype=torch.float64))


def raw(path, *, about=ABOUT, metadata=None, tensors=None, values=(1.0, 0.0, 1.0)):
    """A file of moments as another program would write it, right or wrong."""
    data = np.asarray(values, dtype="<f4").tobytes()
    said = about if isinstance(about, str) else json.dumps(about)
    header = {
        "__metadata__": {"format": "deltaspec-moments", "version": "1", "about": said, **(metadata or {})},
        **(tensors or {"a": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}}),
    }
    return write_raw(path, header, data)


def test_a_file_by_hand_opens(tmp_path):
    found = open_moments(raw(tmp_path / "m", values=(4, 2, 9))).get("b")
    assert found.tolist() == [[4.0, 2.0], [2.0, 9.0]]


LIES = {
    "another file": ({"metadata": {"format": "pt"}}, "no file of moments"),
    "newer": ({"metadata": {"version": "2"}}, "expected 1"),
    "not JSON": ({"about": "{"}, "does not say"),
    "deep": ({"about": "[" * 100_000}, "does not say"),
    "a list": ({"about": []}, "does not say"),
    "no tokens": ({"about": {**ABOUT, "tokens": "7"}}, "'tokens' of type int"),
    "alias to nothing": ({"about": {**ABOUT, "aliases": {"b": "c"}}}, "alias 'b'"),
    "alias to a list": ({"about": {**ABOUT, "aliases": {"b": ["a"]}}}, "alias 'b'"),
    "alias of a stored one": ({"about": {**ABOUT, "aliases": {"a": "a"}}}, "alias 'a'"),
    "no triangle": ({"values": (1, 2)}, "'a' is F32"),
    "square": ({"tensors": {"a": {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}}}, "'a' is F32"),
    "empty": ({"values": ()}, "'a' is F32"),
    "another dtype": ({"tensors": {"a": {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]}}}, "'a' is I32"),
    "beyond its end": ({"tensors": {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}}, "damaged"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie, tmp_path):
    given, said = LIES[lie]
    with pytest.raises(CheckpointError, match=said) as caught:
        open_moments(raw(tmp_path / "m", **given))
    assert "\n" not in str(caught.value)


def test_no_file_and_no_numbers(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_moments(tmp_path / "m")
    for number, values in enumerate(((1, float("nan"), 1), (1, float("inf"), 1), (-1, 0, 1))):
        with pytest.raises(NumericalError, match="'a'"):
            open_moments(raw(tmp_path / f"{number}", values=values)).get("a")


def test_a_file_that_changed_since(tmp_path):
    moments = open_moments(raw(tmp_path / "m"))
    raw(tmp_path / "m", values=(1,))
    with pytest.raises(CheckpointError, match="has changed"):
        moments.get("a")
