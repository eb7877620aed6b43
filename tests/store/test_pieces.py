"""Pieces of long work: what is there is whole, what is damaged is missing."""

from __future__ import annotations

import pytest
import torch

from deltaspec.errors import RunError
from deltaspec.store.pieces import Pieces


def test_a_piece_comes_back_and_overwrites(tmp_path):
    pieces = Pieces(tmp_path / "new" / "folder")
    key = "model.layers.0/../up.weight"
    turned = torch.arange(6.0).view(2, 3).mT  # not contiguous
    pieces.put(key, {"rank": 3, "name": "ж"}, {"a": turned, "b": torch.ones(1, dtype=torch.bfloat16)})
    assert pieces.row(key) == {"rank": 3, "name": "ж"}
    found = pieces.tensors(key)
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], turned)
    assert found["b"].dtype == torch.bfloat16
    assert pieces.row("another") is None
    pieces.put(key, {"rank": 4}, {"a": torch.zeros(1)})
    assert (pieces.row(key), list(pieces.tensors(key))) == ({"rank": 4}, ["a"])
    assert [path.suffix for path in pieces.folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("content", [b"", b"x" * 40, None])
def test_a_damaged_piece_is_gone(tmp_path, content):
    """Cut off, overwritten by something else, or of another kind: removed, to be made again."""
    pieces = Pieces(tmp_path)
    pieces.put("w", {"rank": 3}, {"a": torch.ones(2)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20] if content is None else content)
    assert pieces.row("w") is None
    assert not file.exists()


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file cannot be written \(.*\): free space or rights, then run the same"):
        Pieces(tmp_path / "file").put("w", {}, {"a": torch.ones(1)})
