"""Checkpoints of one training → a folder of runs: what training changed, step by step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError, DeltaspecError, OptionError, PairingError
from deltaspec.io.fingerprint import identify_source
from deltaspec.options import AnalyzeOptions
from deltaspec.store.formats.run import TrajectoryContent
from deltaspec.store.run import Run
from deltaspec.store.trajectory import Trajectory
from deltaspec.types import Step
from deltaspec.workflows.analysis.analyze import analyze_against, plan_analysis
from deltaspec.workflows.analysis.training_steps import find_checkpoints
from deltaspec.workflows.shared.fill_run import Execution
from deltaspec.workflows.shared.opened_base import Base


def trajectory(
    base: str | Path,
    checkpoints: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    options: AnalyzeOptions | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Trajectory:
    """Decompose the change from a base to each checkpoint of a training, and store a run for each step.

    Parameters
    ----------
    base : str or Path
        A folder, a file, or a hub id with @revision.
    checkpoints : sequence of str or Path
        As ``analyze`` takes them, or a training folder, which stands for all its checkpoints. The step is the number
        in a name (step-100, checkpoint-500), else the trainer's own, else 1, 2, 3, … in the order given.
    out : str or Path, optional
        The folder; by default one under ``runs`` named after both sides. Runs that are there already are kept or go
        on, so that a training under way can be analysed again and again.
    options : AnalyzeOptions, optional
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    Trajectory
        Checkpoints that could not be read or paired are in ``failures``, the others stand.

    Raises
    ------
    DeltaspecError
        If the base or no checkpoint at all can be read, the steps make no sense, or the folder belongs to something
        else.
    """
    options = options or AnalyzeOptions()
    found = find_checkpoints(checkpoints)
    if not found:
        message = "There is no checkpoint to analyse: pass one or more, or a training folder."
        raise OptionError(message)
    opened = Base(base)
    manifest = _manifest(opened, options, found)
    result = Trajectory.create_or_resume(out or _default_path(manifest, checkpoints), manifest)
    _fill(result, found, opened, options, _Account(len(found), progress))
    return Trajectory.load(result.path)


def _manifest(base: Base, options: AnalyzeOptions, found: Sequence[tuple[int, str]]) -> TrajectoryContent:
    return {
        "base": identify_source(base.source),
        "options": options.identity(),
        "deltaspec": version("deltaspec"),
        "checkpoints": [{"step": step, "ref": ref} for step, ref in found],
    }


def _fill(
    result: Trajectory, found: Sequence[tuple[int, str]], base: Base, options: AnalyzeOptions, account: _Account
) -> None:
    """Analyse each checkpoint into its run; those that cannot be read or paired are noted, unless that is all."""
    refused: list[DeltaspecError] = []
    sibling: Run | None = None
    for step, ref in found:
        try:
            sibling = analyze_against(base, ref, result.folder(step), Execution(options, account.report, sibling))
            result.note(step, "")
        except (CheckpointError, PairingError) as error:
            refused.append(error)
            result.note(step, " ".join([str(error), *getattr(error, "__notes__", ())]))
        account.next()
    if len(refused) == len(found):
        raise refused[0]


class _Account:
    """Steps of single runs → Steps of all, those to come taken to be as long as the present one."""

    def __init__(self, count: int, progress: Callable[[Step], None] | None) -> None:
        self.left, self.progress = count, progress
        self.before = self.now = Step(0, 0, 0, 0, 0, 0)

    def report(self, step: Step) -> None:
        """Pass on how far all are."""
        self.now = step
        if self.progress:
            self.progress(_add(self.before, step, ahead=self.left))

    def next(self) -> None:
        """Take note that a run has ended."""
        self.before, self.now, self.left = _add(self.before, self.now, ahead=1), Step(0, 0, 0, 0, 0, 0), self.left - 1


def _add(past: Step, step: Step, *, ahead: int) -> Step:
    """Add a run to those before it; ``ahead`` runs of its size were still to be done when it began."""
    return Step(
        past.done + step.done,
        past.total + ahead * step.total,
        past.failed + step.failed,
        past.work_done + step.work_done,
        past.work_total + ahead * step.work_total,
        past.weights_done + step.weights_done,
    )


def _default_path(manifest: TrajectoryContent, checkpoints: Sequence[str | Path]) -> Path:
    """Name the folder after base and training, the same as more checkpoints come."""
    first = Path(checkpoints[0])
    place = first if len(checkpoints) == 1 else first.parent
    place = place if place.name else Path("checkpoints")
    names = [str(manifest["base"]["ref"]).rstrip("/").split("/")[-1] or "model", place.name]
    identity = [manifest["base"]["files"], manifest["options"], str(place.resolve())]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{names[0]}--{names[1]}-trajectory-{digest}"


def plan_steps(base: str | Path, checkpoints: Sequence[str | Path], options: AnalyzeOptions) -> list[dict[str, Any]]:
    """Say what would be compared at each step, reading no weights: one row for each checkpoint.

    Raises
    ------
    DeltaspecError
        If a side cannot be read, or the steps make no sense.
    """
    opened, rows = Base(base), []
    for step, ref in find_checkpoints(checkpoints):
        plan = plan_analysis(opened, ref, options)
        matrices = len(plan.pairs) + len(plan.attached)
        rows.append({"step": step, "checkpoint": ref, "matrices": matrices, "left out": len(plan.skipped)})
    return rows
