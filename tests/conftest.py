"""What belongs to all tests: those that need an extra are skipped where none is wanted, and there alone."""

from __future__ import annotations

import os
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]

EXTRAS = {
    "pandas": "pandas",
    "pyarrow": "parquet",
    **dict.fromkeys(("transformers", "tokenizers", "accelerate", "datasets"), "train"),
    **dict.fromkeys(("peft", "scipy"), "test"),
}


class _Absent(MetaPathFinder):
    """Skip the test, or the file of tests, that imports a package of an extra; elsewhere its absence is a failure.

    What a library tries to import for itself (torch looks for pandas) is absent, and no reason to skip.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname in EXTRAS and _asked_here():
            pytest.skip(f"{fullname} is not installed: deltaspec[{EXTRAS[fullname]}]", allow_module_level=True)


def _asked_here() -> bool:
    """Tell whether the import stands in the tests or in deltaspec, and is one that it cannot do without."""
    frame = sys._getframe(2)
    above, outline = frame, str(ROOT / "deltaspec/architecture/outline/find.py")
    while above.f_back:
        if above.f_code.co_filename == outline:
            return False  # a model that no library tells of is laid out by our own table
        above = above.f_back
    while frame.f_back and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    file = Path(frame.f_code.co_filename)
    return any(file.is_relative_to(ROOT / part) for part in ("tests", "deltaspec", "scripts"))


if os.environ.get("DELTASPEC_EXTRAS") == "bare":
    sys.meta_path.append(_Absent())


@pytest.fixture(autouse=True)
def _advice_that_can_be_followed(monkeypatch):
    """Let a command's error fail the test where it names an option that neither it nor a command it names has."""
    from deltaspec.cli import main

    class Checked(main.UserMistake):
        def __init__(self, message):
            super().__init__(message)
            context = click.get_current_context(silent=True)
            if context is not None and context.invoked_subcommand:
                commands = {context.invoked_subcommand, *(name for name in main.COMMANDS if name in message.split())}
                params = [p for name in commands for p in main.cli.get_command(context, name).params]
                known = {"--help", *(flag for param in params for flag in param.opts)}
                unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", message)) - known
                assert not unknown, f"{context.invoked_subcommand} has no {', '.join(unknown)}: {message}"

    monkeypatch.setattr(main, "UserMistake", Checked)
