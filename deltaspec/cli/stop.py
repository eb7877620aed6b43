"""Ctrl-C as one sentence and exit code 1."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click


@contextmanager
def stoppable() -> Iterator[None]:
    """Say how to go on after Ctrl-C, also where a library swallowed it and failed for it.

    safetensors, reading a tensor in the main thread, clears the interrupt and reports that the tensor has no shape.
    """
    hits: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        hits.append(number)
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not hits and not isinstance(error, KeyboardInterrupt):
            raise
        click.echo("Stopped; run the same command again to go on from here.", err=True)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, before)
