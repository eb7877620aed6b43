"""Outputs that appear whole or not at all, and work that survives a kill."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from deltaspec.errors import RunError
from deltaspec.files.atomic import is_alive, unwritten
from deltaspec.io.sentence_modules import LIST, list_folders
from deltaspec.types.versions import numbers_of

MARK = "deltaspec.json"  # in every folder that deltaspec wrote
ASIDE = "replaced"  # inside the working folder: what stood at out until the commit


class Staging:
    """A folder beside ``out`` to work in; ``commit`` renames what was built there to ``out``.

    Parameters
    ----------
    out : Path
        The folder, or file, to be written.
    identity : dict
        Plain data that decides the result. The same work finds its folder again after a kill, a process at a time.
    overwrite : bool
        Whether ``out`` may be there already; only an empty folder, one that deltaspec wrote and a .safetensors file
        are replaced.
    inputs : sequence of Path
        What is read meanwhile: ``out`` may neither be one of them nor hold one.

    Attributes
    ----------
    path : Path
        The working folder; it exists inside the ``with`` block, and stays after it where nothing was committed.
    """

    def __init__(
        self, out: str | Path, *, identity: dict[str, Any], overwrite: bool, inputs: Sequence[Path] = ()
    ) -> None:
        self.out = Path(out).resolve()
        self.overwrite, self.inputs = overwrite, [Path(source).resolve() for source in inputs]
        if "deltaspec" in identity:
            identity = {**identity, "deltaspec": numbers_of(identity["deltaspec"])}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        self.path = self.out.parent / f"{self.out.name}.partial-{digest}"
        self._pid = self.path / f"pid-{os.getpid()}"

    def __enter__(self) -> Staging:
        """Take the folder and clear what a killed write left in it; RunError where that may not be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._pid.touch()  # before looking for others, so that of two at once none goes on unseen
            self._settle_others()
            self._check_out()
            for leftover in self.path.rglob("*.tmp"):
                leftover.unlink()
        except BaseException as cause:
            self.__exit__(None, None, None)
            if isinstance(cause, OSError):
                raise unwritten(self.path, cause) from cause
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the folder go, and delete it if it is empty."""
        with suppress(OSError):
            self._pid.unlink(missing_ok=True)
            self.path.rmdir()

    def commit(self, built: Path) -> None:
        """Rename ``built``, inside ``path``, to ``out``, and delete the rest of ``path``; RunError leaves ``out``."""
        aside = self.path / ASIDE
        try:
            self._check_out()
            if self.out.exists():
                shutil.rmtree(aside, ignore_errors=True)
                self.out.rename(aside)
            try:
                built.rename(self.out)
            except OSError:
                if aside.exists():
                    aside.rename(self.out)
                raise
        except OSError as cause:
            raise unwritten(self.out, cause) from cause
        shutil.rmtree(self.path, ignore_errors=True)

    def _settle_others(self) -> None:
        """Refuse to work beside a living process; bring back what one that died in its commit had moved aside."""
        for folder in self.out.parent.glob(f"{glob.escape(self.out.name)}.partial-????????"):
            for pid in folder.glob("pid-*"):
                if pid != self._pid and _lives(pid):
                    message = f"Cannot write '{self.out}': another process ({pid}) is at it; wait, or delete that file."
                    raise RunError(message)
            aside = folder / ASIDE
            if aside.exists() and not self.out.exists():
                aside.rename(self.out)

    def _check_out(self) -> None:
        if not self.out.exists():
            return
        kept = (Path.cwd(), Path.home(), *self.inputs)
        why = ""
        if not self.overwrite:
            why = "it is there already; pass --overwrite to replace it, or another name"
        elif any(place.is_relative_to(self.out) for place in kept):
            why = "it is or holds an input, the working folder or your home; pass another name"
        elif self.out.is_file() and any(self.out.is_relative_to(source) for source in self.inputs):
            why = "it is a file of an input; pass another name"
        elif not _replaceable(self.out):
            why = (
                f"it is not deltaspec's to replace, without {MARK} in it and in each of its folders; pass another name"
            )
        if why:
            message = f"Cannot write '{self.out}': {why}."
            raise RunError(message)


def _replaceable(out: Path) -> bool:
    if out.is_file():
        return out.suffix == ".safetensors"
    inside = list(out.iterdir())
    marked = (out / MARK).is_file()
    modules = list_folders(out / LIST) if marked and (out / LIST).is_file() else {}  # merge copies these
    folders = [path for path in inside if path.is_dir() and path.name not in {name.split("/")[0] for name in modules}]
    marked = marked or len(folders) == len(inside)  # one folder for each of several adapters
    return marked and all((folder / MARK).is_file() and not _holds_folders(folder) for folder in folders)


def _holds_folders(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.iterdir())


def _lives(pid: Path) -> bool:
    """Tell whether the process that left this file still runs."""
    number = pid.name.removeprefix("pid-")
    if number.isdecimal() and is_alive(int(number)):
        return True
    pid.unlink(missing_ok=True)
    return False
