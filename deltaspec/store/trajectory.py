"""A folder of runs, one for each checkpoint of a training; specified in format.md."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.errors import RunError, require
from deltaspec.files.atomic import is_leftover, write_whole
from deltaspec.store.formats.run import TrajectoryContent, TrajectoryManifest
from deltaspec.store.run import Run, differences

if TYPE_CHECKING:
    import pandas

FILE, FORMAT, VERSION = "trajectory.json", "deltaspec-trajectory", 1
IDENTITY = ("base", "options", "deltaspec")


class Trajectory:
    """The results of several checkpoints of one training, on disk.

    Attributes
    ----------
    path : Path
    manifest : TrajectoryManifest
        The base, the options, and a row for each checkpoint; see format.md.
    """

    def __init__(self, path: Path, manifest: TrajectoryManifest) -> None:
        self.path, self.manifest = path, manifest

    def __repr__(self) -> str:
        return f"Trajectory({str(self.path)!r}, steps={self.steps})"

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Open an existing folder.

        Raises
        ------
        RunError
            If it holds no trajectory, or a newer deltaspec wrote it.
        """
        file = Path(path) / FILE
        try:
            manifest: TrajectoryManifest = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as cause:
            message = f"{file} cannot be read ({cause}): expected a folder that deltaspec analyze wrote."
            raise RunError(message) from cause
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            message = f'{file} is not a deltaspec trajectory: expected "format": "{FORMAT}".'
            raise RunError(message)
        if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
            found = manifest.get("version")
            message = f"{file} has format version {found}, this deltaspec reads up to {VERSION}: upgrade."
            raise RunError(message)
        return cls(Path(path), manifest)

    @classmethod
    def create_or_resume(cls, path: str | Path, manifest: TrajectoryContent) -> Trajectory:
        """Start a trajectory, or go on with the one at ``path`` if base and options are the same; steps are added.

        Raises
        ------
        RunError
            If the folder holds something else, cannot be written, or belongs to another base or other options.
        """
        folder, rows = Path(path), {row["step"]: row for row in manifest["checkpoints"]}
        try:
            if (folder / FILE).exists():
                old = cls.load(folder).manifest
                found = list(differences(old, json.loads(json.dumps(manifest)), IDENTITY))
                if found:
                    message = (
                        f"{folder} holds a trajectory of something else ({'; '.join(found[:3])}): "
                        "pass another folder with -o, or delete this one."
                    )
                    raise RunError(message)
                rows = {row["step"]: row for row in old["checkpoints"]} | rows
            elif folder.exists() and (not folder.is_dir() or not all(map(is_leftover, folder.iterdir()))):
                message = f"{folder} exists and is no trajectory: pass another one with -o."
                raise RunError(message)
        except OSError as cause:
            message = f"The folder {folder} cannot be read ({cause.strerror}): pass another one with -o."
            raise RunError(message) from cause
        found_rows = [rows[step] for step in sorted(rows)]
        trajectory = cls(folder, {"format": FORMAT, "version": VERSION, **manifest, "checkpoints": found_rows})
        trajectory.write()
        return trajectory

    def write(self) -> None:
        """Write trajectory.json.

        Raises
        ------
        RunError
            If it cannot be written.
        """
        write_whole(self.path / FILE, json.dumps(self.manifest, indent=1).encode(), refusal=_unwritable)

    def note(self, step: int, failure: str) -> None:
        """Store why a checkpoint has no run; "" forgets an earlier failure."""
        for row in self.manifest["checkpoints"]:
            if row["step"] == step:
                row.pop("failure", None)
                if failure:
                    row["failure"] = failure
        self.write()

    def folder(self, step: int) -> Path:
        """Return the run directory of a step."""
        return self.path / f"step-{step:08}"

    @cached_property
    def _runs(self) -> dict[int, Run]:
        steps = [row["step"] for row in self.manifest["checkpoints"]]
        return {s: Run.load(self.folder(s)) for s in steps if (self.folder(s) / "manifest.json").exists()}

    @property
    def steps(self) -> list[int]:
        """Training steps with a run, ascending."""
        return list(self._runs)

    @property
    def runs(self) -> list[Run]:
        """The run of each step."""
        return list(self._runs.values())

    @property
    def failures(self) -> dict[int, str]:
        """Steps whose checkpoint could not be read or paired: step → the sentence that says why."""
        return {row["step"]: row["failure"] for row in self.manifest["checkpoints"] if "failure" in row}

    @property
    def missing(self) -> list[int]:
        """Steps without a run or failure yet: the work was stopped."""
        steps = [row["step"] for row in self.manifest["checkpoints"]]
        return [step for step in steps if step not in self._runs and step not in self.failures]

    @property
    def complete(self) -> bool:
        """Whether every matrix of every checkpoint has a result."""
        return not (self.failures or self.missing or any(run.failures or run.missing for run in self.runs))

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict for each step and record: ``step``, then what ``Run.to_dicts`` says."""
        return [{"step": step, **row} for step, run in self._runs.items() for row in run.to_dicts()]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the same as a DataFrame (pandas is optional)."""
        frame: pandas.DataFrame = require("pandas", extra="pandas").DataFrame(self.to_dicts())
        return frame


def _unwritable(file: Path, cause: OSError) -> RunError:
    message = f"The folder {file.parent} cannot be written ({cause.strerror}): pass another one with -o."
    return RunError(message)


def load_results(path: str | Path) -> Run | Trajectory:
    """Open what ``analyze`` wrote: a run, or a trajectory of runs.

    Raises
    ------
    RunError
        If it is neither.
    """
    return Trajectory.load(path) if (Path(path) / FILE).is_file() else Run.load(path)
