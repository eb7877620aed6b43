"""Finished training folders, and a label for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaspec.errors import OptionError, RunError
from deltaspec.io.fingerprint import identify_source
from deltaspec.options.training import TargetOptions
from deltaspec.store.formats.training import DataReport, TrainingReport
from deltaspec.store.training_folder import FINAL, read_report
from deltaspec.training.methods import METHODS
from deltaspec.workflows.shared.opened_base import Base

Fields = Mapping[str, Any]
"""A TrainingReport, of which fields are looked up by names that tables hold."""


@dataclass(frozen=True, slots=True)
class FinishedTraining:
    """One finished training: its folder, report and label."""

    folder: Path
    report: TrainingReport
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
        """Name the run of its ΔW after its method, and a hash of its report: no two trainings have the same."""
        digest = hashlib.sha256(json.dumps(self.report, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.report['method']}-{digest}"


def open_trainings(folders: Sequence[str | Path]) -> list[FinishedTraining]:
    """Read the reports of finished trainings, each with a label that tells it from the others.

    Raises
    ------
    OptionError
        If there is no folder, or one is given twice.
    RunError
        If one is no finished training, or of another base.
    """
    if not folders:
        message = "There is no training to compare: pass one or more training folders."
        raise OptionError(message)
    found: list[tuple[Path, TrainingReport]] = []
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
    _check_data(found)
    labels = make_labels([report for _, report in found])
    return [FinishedTraining(folder, report, label) for (folder, report), label in zip(found, labels, strict=True)]


def _check_data(found: Sequence[tuple[Path, TrainingReport]]) -> None:
    """Refuse trainings whose held-out data are not of one kind: what they learned cannot be compared."""
    first, wanted = found[0][0], _name_data(found[0][1]["data"])
    for folder, report in found[1:]:
        for name, value in _name_data(report["data"]).items():
            if value != wanted[name] and (name != "forget" or None not in (value, wanted[name])):
                message = (
                    f"'{folder}' and '{first}' are of other data ({name}: {value!r} and {wanted[name]!r}): compare "
                    "trainings that are evaluated on the same."
                )
                raise RunError(message)


def _name_data(data: DataReport) -> dict[str, object]:
    """Say what a training is evaluated on, whichever split a seed draws; files by their names, for folders move."""
    named: dict[str, object] = {name: data[name] for name in ("task", "text", "label", "names", "length")}
    sources = {name: None if ref is None else str(ref).split("/")[-1] for name, ref in data["sources"].items()}
    named |= {"held": sources["held"], "forget": sources["forget"]}
    if sources["held"] is None:
        named |= {"train": sources["train"], "holdout": data["holdout"], "limit": data["limit"]}
    return named


def open_base(trainings: Sequence[FinishedTraining]) -> Base:
    """Open the base of trainings where it was when they began.

    Raises
    ------
    CheckpointError
        If it is gone.
    RunError
        If it is another by now.
    """
    wanted = trainings[0].report["base"]
    base = Base(wanted["ref"])
    if identify_source(base.source)["files"] != wanted["files"]:
        message = (
            f"The base '{wanted['ref']}' was changed since '{trainings[0].folder}' was trained from it: put it back, "
            "or train again."
        )
        raise RunError(message)
    return base


def _open(folder: Path) -> tuple[Path, TrainingReport]:
    report = read_report(folder)
    if "runs" in report and report.get("best"):
        folder = folder / str(report["best"])
        report = read_report(folder)
    if not report.get("finished") or not (folder / FINAL).is_dir():
        message = f"'{folder}' is no finished training: give its train command again, and it goes on to the end."
        raise RunError(message)
    if report["method"] not in METHODS:
        message = f"'{folder}' was trained by '{report['method']}', which this deltaspec does not know: upgrade."
        raise RunError(message)
    return folder, report


def make_labels(reports: Sequence[Fields]) -> list[str]:
    """Name each training by its method, and by what tells it from others of that method, but for the seed.

    Values that are the options' own go without saying, but for ranks; what the loop did is said where options do not
    tell two apart.

    Examples
    --------
    >>> one = {"method": "bitfit", "method_options": {}, "targets": {}, "loop": {"lr": 1e-4, "steps": 9}}
    >>> make_labels([one, {**one, "loop": {"lr": 1e-3, "steps": 9}}])
    ['bitfit lr=0.0001', 'bitfit lr=0.001']
    """
    bare = [" ".join([report["method"], *_unlike(report, reports)]) for report in reports]
    labels = []
    for report, label in zip(reports, bare, strict=True):
        peers = [other for other, named in zip(reports, bare, strict=True) if named == label]
        told = [name for name in ("lr", "steps", "epochs", "batch") if _differ(peers, "loop", name)]
        labels.append(" ".join([label, *(f"{name}={report['loop'][name]:g}" for name in told)]))
    return labels


def _unlike(report: Fields, reports: Sequence[Fields]) -> Iterator[str]:
    peers = [other for other in reports if other["method"] == report["method"]]
    usual = asdict(METHODS[report["method"]].options()) | asdict(TargetOptions())
    for place in ("method_options", "targets"):
        for name, value in report[place].items():
            if _differ(peers, place, name) and (name == "rank" or value != usual.get(name)):
                yield name if value is True else f"{'r' if name == 'rank' else name}={value}"


def _differ(reports: Sequence[Fields], place: str, name: str) -> bool:
    return any(report[place].get(name) != reports[0][place].get(name) for report in reports)
