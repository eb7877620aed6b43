"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import deltaspec

ROOT = Path(deltaspec.__file__).parent
MODULES = [path for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_of_a_module(path):
    names = path.relative_to(ROOT.parent).with_suffix("").parts
    found = doctest.testmod(importlib.import_module(".".join(names[: -1 if names[-1] == "__init__" else None])))
    assert found.attempted
    assert not found.failed
