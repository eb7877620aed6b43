"""What belongs to all tests: those that need an extra are skipped where none is wanted, and there alone."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder

import pytest

EXTRAS = {
    "pandas": "pandas",
    "pyarrow": "parquet",
    **dict.fromkeys(("transformers", "tokenizers", "accelerate", "datasets"), "train"),
    **dict.fromkeys(("peft", "scipy"), "test"),
}


class _Absent(MetaPathFinder):
    """Skip the test, or the file of tests, that imports a package of an extra; elsewhere its absence is a failure."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in EXTRAS:
            pytest.skip(f"{fullname} is not installed: deltaspec[{EXTRAS[fullname]}]", allow_module_level=True)


if os.environ.get("DELTASPEC_EXTRAS") == "bare":
    sys.meta_path.append(_Absent())
