"""A run and a trajectory: ``manifest.json``, ``trajectory.json``, ``vectors.json`` and failures."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from deltaspec.types import OneSidedBlocks, PlainFields, SkippedTensor, SourceIdentity


class RunIdentity(TypedDict):
    """What must be the same for a run to go on, ``ref`` and ``revision`` apart."""

    base: SourceIdentity
    tuned: SourceIdentity
    options: PlainFields
    deltaspec: str


class Environment(TypedDict):
    """Versions and machine that computed something; for the reader, never compared."""

    deltaspec: str
    versions: dict[str, str]
    machine: dict[str, str]


class RunContent(RunIdentity):
    """What whoever begins a run says of it; ``planned`` are the keys of all records, in order."""

    versions: dict[str, str]
    machine: dict[str, str]
    family: str
    notes: list[str]
    skipped: list[SkippedTensor]
    planned: list[str]
    one_sided: list[OneSidedBlocks]


class Manifest(RunContent):
    """``manifest.json`` of a run."""

    format: str
    version: int


class FailedRecord(TypedDict):
    """``<key>.failed.json``: why a matrix has no record."""

    key: str
    message: str


class VectorRow(TypedDict):
    """One norm or bias in ``vectors.json``; numbers are None where it is not finite or has no base."""

    tensor: str
    role: str
    depth: int | None
    stack: str
    size: int
    base_norm: float | None
    relative_norm: float | None
    unchanged_fraction: float | None


class CheckpointRow(TypedDict):
    """One checkpoint of a trajectory; ``failure`` where it has no run."""

    step: int
    ref: str
    failure: NotRequired[str]


class TrajectoryContent(TypedDict):
    """What whoever begins a trajectory says of it."""

    base: SourceIdentity
    options: PlainFields
    deltaspec: str
    checkpoints: list[CheckpointRow]


class TrajectoryManifest(TrajectoryContent):
    """``trajectory.json``."""

    format: str
    version: int
