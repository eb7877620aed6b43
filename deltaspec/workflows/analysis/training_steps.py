"""Which checkpoints a trajectory is made of, and the training step of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.files.json_file import read_json
from deltaspec.io.file_formats import SAVED
from deltaspec.store.formats.training import TrainingReport
from deltaspec.store.training_folder import CHECKPOINTS, FINAL, REPORT, read_report

STEP = re.compile(r"(?:^|[-_.])(?:step|global_step|checkpoint|iter)s?[-_]?([0-9]{1,15})(?![0-9])")
STATE = "trainer_state.json"  # of transformers' Trainer


def is_training(ref: str | Path) -> bool:
    """Tell whether a path is a folder of checkpoints: one that deltaspec train wrote, or of checkpoint-… folders."""
    folder = Path(ref).expanduser()
    if (folder / REPORT).is_file():
        return True
    if not folder.is_dir():
        return False
    files = any(path.is_file() and path.name.endswith(SAVED) for path in folder.iterdir())
    return not files and any(_list_steps(folder))


def find_checkpoints(refs: Sequence[str | Path]) -> list[tuple[int, str]]:
    """Return checkpoints with their steps, in the order of steps; training folders stand for all that they hold.

    Parameters
    ----------
    refs : sequence of str or Path
        Folders, files and hub ids with @revision. The step is the number in the name (step-100, checkpoint-500,
        global_step1000, a revision step3000), else the one that ``trainer_state.json`` tells, or of ``final`` the
        training's own report; where no checkpoint has one, they are 1, 2, 3, … in the order given.

    Raises
    ------
    OptionError
        If two are of one step, or some have a step and others none.
    CheckpointError
        If a training folder holds no checkpoint yet.
    """
    found: list[tuple[int | None, str]] = []
    for ref in refs:
        found += _open_training(Path(ref).expanduser()) if is_training(ref) else [(_step_of(ref), str(ref))]
    unknown = [ref for step, ref in found if step is None]
    if unknown and len(unknown) < len(found):
        message = f"Cannot tell the training step of '{unknown[0]}', while others have one: name it step-… or leave it."
        raise OptionError(message)
    numbered = [(number if step is None else step, ref) for number, (step, ref) in enumerate(found, start=1)]
    numbered.sort(key=lambda row: row[0])
    for (step, first), (other, second) in pairwise(numbered):
        if step == other:
            message = f"Two checkpoints are of step {step}, '{first}' and '{second}': pass one of them."
            raise OptionError(message)
    return numbered


def _open_training(folder: Path) -> list[tuple[int | None, str]]:
    """List a training folder's checkpoints; of several learning rates, those of the best."""
    rows: list[tuple[int | None, str]] = []
    if (folder / REPORT).is_file():
        report = read_report(folder)
        if "runs" in report:
            if not report.get("best"):
                message = (
                    f"'{folder}' holds trainings of several learning rates and none is finished: pass one of them."
                )
                raise CheckpointError(message)
            folder = folder / str(report["best"])
            report = read_report(folder)
        rows += _list_steps(folder / CHECKPOINTS)
        last = _last_step(report)
        if (folder / FINAL).is_dir() and last is not None and last not in [step for step, _ in rows]:
            rows.append((last, str(folder / FINAL)))
    else:
        rows += _list_steps(folder)
    if not rows:
        message = f"'{folder}' holds no checkpoint yet: wait for the first, or train with --checkpoint-every."
        raise CheckpointError(message)
    return rows


def _list_steps(folder: Path) -> Iterator[tuple[int | None, str]]:
    """Yield the folders inside that are named after a step."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and path.suffix != ".tmp" and STEP.search(path.name):
            yield _step_of(path), str(path)


def _step_of(ref: str | Path) -> int | None:
    """Return the step that a checkpoint's name or its trainer's state tells."""
    name = re.split(r"[/@]", str(ref).rstrip("/"))[-1]
    if match := STEP.search(name):
        return int(match[1])
    state = Path(ref).expanduser() / STATE
    step = read_json(state).get("global_step") if state.is_file() else None
    if isinstance(step, int) and step >= 0:
        return step
    training = Path(ref).expanduser().absolute().parent
    ends = name == FINAL and (training / REPORT).is_file()
    return _last_step(read_report(training)) if ends else None


def _last_step(report: TrainingReport) -> int | None:
    """Return the step at which a training ended, if its report tells."""
    step = report["results"].get("steps") if report.get("results") else None
    return step if isinstance(step, int) and step >= 0 else None
