"""Progress on stderr: a live line on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deltaspec.types import Step

HEARTBEAT, REDRAW = 30.0, 0.5


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Progress:
    """A context manager to call with each Step; silent if ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self.step: Step | None = None
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __call__(self, step: Step) -> None:
        """Take note of how far the run is."""
        if self.step is None:
            self._start = time.monotonic()
        self.step = step

    def __enter__(self) -> Progress:
        """Begin to print."""
        if not self.quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and leave the terminal's line empty."""
        self._stop.set()
        if not self.quiet:
            self._thread.join()
            if self.live and self.step:
                click.echo("\r\x1b[K", nl=False, err=True)

    def _tick(self) -> None:
        while not self._stop.wait(REDRAW if self.live else HEARTBEAT):
            if self.step:
                click.echo(f"\r\x1b[K{self.line()}" if self.live else self.line(), nl=not self.live, err=True)

    def line(self) -> str:
        """Say how many matrices are done, how fast, and how long the rest will take."""
        step = self.step
        if step is None:
            return "starting"
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = f"{step.weights_done / elapsed / 1e6:.1f} M weights/s"
        left = clock(elapsed * (step.work_total / step.work_done - 1)) if step.work_done else "?"
        failed = f", {step.failed} failed" if step.failed else ""
        return f"{step.done}/{step.total} matrices{failed}, {rate}, {clock(elapsed)} gone, {left} left"
