"""The names of a run's files."""

from __future__ import annotations

import pytest

from deltaspec.store.record import LONGEST_NAME, file_stem


@pytest.mark.parametrize("length", [LONGEST_NAME - 1, LONGEST_NAME, LONGEST_NAME + 1])
def test_names_are_hashed_beyond_a_length_and_not_before(length):
    stem = file_stem("x" * length)
    assert (stem == "x" * length) == (length <= LONGEST_NAME)
    assert len(stem) == (length if length <= LONGEST_NAME else 140 + 1 + 24)
    assert file_stem("a/b") == "a%2Fb"
