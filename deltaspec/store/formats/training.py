"""A training folder: ``train.json``, ``metrics.jsonl`` and ``position.json``."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from deltaspec.types import PlainFields, SourceIdentity


class DataOrigins(TypedDict):
    """Where a training's data came from: files or hub ids, None where there are none."""

    train: str
    held: str | None
    forget: str | None


class DataReport(TypedDict):
    """DataOptions, what they were read from, the classes, and a hash of the token ids and labels."""

    task: str
    text: str
    label: str
    length: int
    holdout: float
    limit: int
    cut: bool
    seed: int
    names: list[str]
    sources: DataOrigins
    forget_options: PlainFields | None
    sha256: str


class LoopReport(TypedDict):
    """LoopOptions; ``lr`` is a list in the report of several rates."""

    lr: float | list[float]
    epochs: int
    steps: int
    batch: int
    accumulate: int
    warmup: float
    schedule: str
    weight_decay: float
    clip: float
    seed: int


class TrainingIdentity(TypedDict):
    """What must be the same for a training to go on; ``ref``, ``revision`` and ``sources`` may differ."""

    base: SourceIdentity
    method: str
    method_options: PlainFields
    targets: PlainFields
    data: DataReport
    run: PlainFields
    loop: LoopReport
    processes: int


class CountsReport(TypedDict):
    """Numbers of parameters; see Counts."""

    trainable: int
    head: int
    stored: int
    total: int


class Evaluation(TypedDict):
    """What held-out data say: loss, and accuracy or perplexity."""

    loss: float
    accuracy: NotRequired[float]
    perplexity: NotRequired[float]


class Learned(Evaluation):
    """The evaluation after training, and the one before it."""

    before: Evaluation


class Forgotten(TypedDict):
    """One number on other data, before and after."""

    metric: str
    before: float
    after: float


class TrainingResults(TypedDict):
    """What a finished training reports; seconds, and bytes that this process held at most."""

    learned: Learned | None
    forgotten: Forgotten | None
    steps: int
    seconds_per_step: float
    peak_memory: int


class RateRow(TypedDict):
    """One of several learning rates: its folder, and its results or why it failed."""

    lr: float
    folder: str
    results: NotRequired[TrainingResults]
    failed: NotRequired[str]


class TrainingReport(TrainingIdentity):
    """``train.json``; what is NotRequired comes with the end, ``runs`` and ``best`` where there are several rates."""

    format: int
    finished: bool
    versions: NotRequired[dict[str, str]]
    counts: NotRequired[CountsReport]
    notes: NotRequired[list[str]]
    results: NotRequired[TrainingResults]
    runs: NotRequired[list[RateRow]]
    best: NotRequired[str]


class MetricsLine(TypedDict):
    """One line of ``metrics.jsonl``: of a step, of an evaluation, or of what is kept of other data."""

    step: int
    epoch: NotRequired[float]
    loss: NotRequired[float]
    lr: NotRequired[float]
    grad_norm: NotRequired[float]
    seconds: NotRequired[float]
    eval: NotRequired[Evaluation]
    forget: NotRequired[dict[str, float]]


class Position(TypedDict):
    """``position.json`` of a checkpoint that training can go on from."""

    step: int
    scaler: dict[str, float] | None
