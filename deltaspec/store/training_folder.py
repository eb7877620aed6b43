"""A training folder: its report, its metrics, and checkpoints that are there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from deltaspec.errors import RunError
from deltaspec.files import json_file, tensor_reader
from deltaspec.files.atomic import unwritten, whole_folder, write_whole
from deltaspec.files.tensor_writer import write_tensors
from deltaspec.store.formats.training import MetricsLine, Position, TrainingReport

FORMAT = 1
REPORT, METRICS, CHECKPOINTS, FINAL, RESUME = "train.json", "metrics.jsonl", "checkpoints", "final", "resume"
STATE, POSITION = "state.safetensors", "position.json"
UNLIKE = {"ref", "revision", "sources"}  # may be named otherwise as long as what is in them is the same


class Folder:
    """One training on disk.

    Parameters
    ----------
    path : Path
    writes : bool
        Whether this process is the one that writes; others only read.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.report: TrainingReport

    def begin(self, identity: Mapping[str, object], *, overwrite: bool) -> None:
        """Start a training, or go on with the same one; ``report`` is what stands in train.json.

        Parameters
        ----------
        identity : mapping
            What TrainingIdentity says.
        overwrite : bool
            Start again where the folder holds a training.

        Raises
        ------
        RunError
            If the folder holds something else, or a training with other options.
        """
        try:
            found = self._read()
            if overwrite and self.writes:
                self._clear()
                found = None
            if found is None:
                self.write({"format": FORMAT, **identity, "finished": False})
                return
            differences = list(_differences(found, json.loads(json.dumps(identity))))
            if differences:
                message = (
                    f"'{self.path}' holds another training ({'; '.join(differences[:3])}): "
                    "pass another folder with -o, or --overwrite to start again in this one."
                )
                raise RunError(message)
            self.report = found
            for leftover in (*self.path.glob("*.tmp"), *(self.path / CHECKPOINTS).glob("*.tmp")) if self.writes else ():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError as cause:
            raise unwritten(self.path, cause) from cause

    def _read(self) -> TrainingReport | None:
        """Return train.json, or None where nothing has begun."""
        file = self.path / REPORT
        if not file.exists():
            if self.path.exists() and (not self.path.is_dir() or any(not _is_ours(p) for p in self.path.iterdir())):
                message = f"'{self.path}' exists and is no training folder: pass another one with -o."
                raise RunError(message)
            return None
        return read_report(self.path)

    def _clear(self) -> None:
        """Delete an earlier training; what else lies in the folder stays."""
        for path in sorted(self.path.iterdir() if self.path.exists() else (), key=lambda path: path.name != REPORT):
            if _is_ours(path):  # the report first: what a kill leaves of the rest is then no training
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, report: Mapping[str, object]) -> None:
        """Write train.json; ``report`` is what TrainingReport says."""
        self.report = cast("TrainingReport", report)
        if not self.writes:
            return
        write_whole(self.path / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())

    def log(self, line: Mapping[str, object]) -> None:
        """Add a line to metrics.jsonl: what MetricsLine says."""
        if not self.writes:
            return
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as cause:
            raise unwritten(self.path / METRICS, cause) from cause

    def metrics(self) -> list[MetricsLine]:
        """Read the lines of metrics.jsonl; one that a kill cut off is left out."""
        return list(read_metrics(self.path))

    def rewind(self, step: int | None) -> None:
        """Drop the metrics after a step; None drops all."""
        if not self.writes:
            return
        kept = [line for line in self.metrics() if step is not None and line["step"] <= step]
        write_whole(self.path / METRICS, "".join(f"{json.dumps(line)}\n" for line in kept).encode())

    def newest(self) -> tuple[Position, dict[str, Tensor]] | None:
        """Read the position and state of the newest checkpoint that training can go on from."""
        places = sorted((self.path / CHECKPOINTS).glob(f"step-*/{RESUME}/{POSITION}"))
        if not places:
            return None
        position = json_file.read_json(places[-1])
        specs, _ = tensor_reader.list_tensors(places[-1].with_name(STATE))
        return cast("Position", position), {name: tensor_reader.load_tensor(spec) for name, spec in specs.items()}

    def checkpoint(
        self, step: int, save: Callable[[Path], None], state: Mapping[str, Tensor], position: Mapping[str, object]
    ) -> None:
        """Write a checkpoint under a temporary name, rename it, then drop the states of earlier ones."""
        if not self.writes:
            return
        name = f"step-{step:08}"
        with whole_folder(self.path / CHECKPOINTS / name) as folder:  # a rewound training may come by a step again
            save(folder)
            write_tensors(folder / RESUME / STATE, state)
            write_whole(folder / RESUME / POSITION, json.dumps(position).encode())
        self.drop_states(but=name)

    def finish(self, save: Callable[[Path], None]) -> None:
        """Write what the training ends with."""
        if self.writes:
            with whole_folder(self.path / FINAL) as folder:
                save(folder)

    def drop_states(self, *, but: str = "") -> None:
        """Delete what only a resumption needs."""
        for place in (self.path / CHECKPOINTS).glob(f"step-*/{RESUME}"):
            if self.writes and place.parent.name != but:
                shutil.rmtree(place, ignore_errors=True)


def read_report(path: Path) -> TrainingReport:
    """Read a training folder's train.json.

    Raises
    ------
    RunError
        If there is none, or it is damaged, or of a newer format.
    """
    file = path / REPORT
    if not file.is_file():
        message = f"'{path}' is no training folder (it has no {REPORT}): pass what `deltaspec train -o` wrote."
        raise RunError(message)
    try:
        found: TrainingReport = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        message = f"{file} cannot be read ({cause}): train again with --overwrite."
        raise RunError(message) from cause
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        message = f'{file} is not of a training that this deltaspec reads: expected "format": {FORMAT}.'
        raise RunError(message)
    return found


def read_metrics(path: Path) -> Iterator[MetricsLine]:
    """Yield the lines of a training folder's metrics.jsonl, but for one that a kill cut off."""
    file = path / METRICS
    if not file.exists():
        return
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def _is_ours(path: Path) -> bool:
    return (
        path.name in (REPORT, METRICS, CHECKPOINTS, FINAL) or path.name.endswith(".tmp") or path.name.startswith("lr-")
    )


def _differences(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name in sorted(new.keys() - UNLIKE):
        before, after = old.get(name), new[name]
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} was {before}, now {after}"
