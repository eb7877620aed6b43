"""How ``deltaspec train`` speaks: progress by step, and a report in words."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaspec.cli.progress import Progress, clock
from deltaspec.cli.table import printable


class Ticks(Progress):
    """Progress in steps."""

    first = 0
    step: Any = None

    def __call__(self, step: Any) -> None:
        """Take note; with several rates, each training begins anew."""
        if self.step is None or step.step < self.step.step:
            self.first, self._start = step.step, time.monotonic()
        self.step = step

    def line(self) -> str:
        """Say how far the training is, its loss and rate, and how long the rest will take."""
        tick = self.step
        if tick is None:
            return "reading data and model"
        elapsed = time.monotonic() - self._start
        speed = (tick.step - self.first) / elapsed if elapsed else 0.0
        left = clock((tick.total - tick.step) / speed) if speed else "?"
        return (
            f"step {tick.step}/{tick.total}, loss {tick.loss:.4g}, lr {tick.lr:.3g}, {speed:.2f} steps/s, {left} left"
        )


def describe(report: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Say in words what a training's report holds."""
    if "runs" not in report:
        yield from _describe_one(report)
        yield f"\nTraining: {out}"
        return
    for row in report["runs"]:
        mark = " (best)" if row["folder"] == report["best"] else ""
        yield f"lr {row['lr']:g}{mark}: {row.get('failed') or _describe_learned(row['results']['learned'])}"
    yield f"\nTrainings: {out}"


def _describe_one(report: Mapping[str, Any]) -> Iterator[str]:
    counts, results = report["counts"], report["results"]
    head = f", {counts['head']:,} more in the head" if counts["head"] else ""
    yield f"{report['method']}: {counts['trainable']:,} of {counts['total']:,} parameters trained{head}"
    if results["learned"]:
        yield f"Learned: {_describe_learned(results['learned'])}"
    if results["forgotten"]:
        lost = results["forgotten"]
        yield f"Other data: {lost['metric']} {lost['before']:.4g} before, {lost['after']:.4g} after"
    yield from (f"Note: {printable(note)}." for note in report["notes"])
    memory = results["peak_memory"] / 2**20
    yield f"{results['steps']} steps, {results['seconds_per_step']:.3g} s each (median), {memory:,.0f} MiB at most"


def _describe_learned(learned: Mapping[str, Any]) -> str:
    metric = "accuracy" if "accuracy" in learned else "perplexity"
    before = learned["before"]
    return f"{metric} {before[metric]:.4g} before, {learned[metric]:.4g} after (loss {learned['loss']:.4g})"
