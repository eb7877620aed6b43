"""Finished training folders, and a label for each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaspec.errors import OptionError, RunError
from deltaspec.training.methods import METHODS
from deltaspec.workflows.train_folder import FINAL, read_report


@dataclass(frozen=True, slots=True)
class Trained:
    """One finished training: its folder, report and label."""

    folder: Path
    report: dict[str, Any]
    label: str

    @property
    def changes_weights(self) -> bool:
        """Whether there is a ΔW."""
        return METHODS[self.report["method"]].space != "activation"

    @property
    def seed(self) -> int:
        """Of the loop."""
        return int(self.report["loop"]["seed"])

    @property
    def run_name(self) -> str:
        """Name the run of its ΔW after its label, and a hash of its report: no two trainings have the same."""
        digest = hashlib.sha256(json.dumps(self.report, sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9=.]+', '-', self.label)}-{digest}"


def open_trainings(folders: Sequence[str | Path]) -> list[Trained]:
    """Read the reports of finished trainings, each with a label that tells it from the others.

    Raises
    ------
    OptionError
        If a folder is given twice.
    RunError
        If one is no finished training, or of another base.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    for ref in folders:
        folder, report = _open(Path(ref).expanduser())
        if any(folder.resolve() == other.resolve() for other, _ in found):
            message = f"'{folder}' is given twice: pass each training once."
            raise OptionError(message)
        found.append((folder, report))
    first = found[0][1]["base"]
    for folder, report in found[1:]:
        if report["base"]["files"] != first["files"]:
            message = (
                f"'{folder}' was trained from '{report['base']['ref']}', the others from '{first['ref']}': compare "
                "trainings of one base."
            )
            raise RunError(message)
    labels = make_labels([report for _, report in found])
    return [Trained(folder, report, label) for (folder, report), label in zip(found, labels, strict=True)]


def _open(folder: Path) -> tuple[Path, dict[str, Any]]:
    report = read_report(folder)
    if "runs" in report and report.get("best"):
        folder = folder / str(report["best"])
        report = read_report(folder)
    if not report.get("finished") or not (folder / FINAL).is_dir():
        message = f"'{folder}' is no finished training: give its train command again, and it goes on to the end."
        raise RunError(message)
    return folder, report


def make_labels(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Name each training by its method, and by those of its options in which it differs from others of that method."""
    labels = []
    for report in reports:
        peers = [other for other in reports if other["method"] == report["method"]]
        pieces = [report["method"]]
        for place in ("method_options", "targets"):
            for name, value in report[place].items():
                if any(other[place].get(name) != value for other in peers):
                    pieces.append(f"{'r' if name == 'rank' else name}={value}")
        labels.append(" ".join(pieces))
    return labels
