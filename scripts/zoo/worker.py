"""A process that examines architectures one by one, so that a crash or a hang costs one of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

MEMORY = 10 << 30  # a configuration that did not become small fails instead of swapping
RENEWED = 60  # architectures, after which a fresh process takes over


def serve(pipe: Connection) -> None:
    """Answer names with rows until the other side closes."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    from .catalogue import list_species
    from .examine import examine

    species = list_species()
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(examine(species[name]))
        except Exception as error:
            where = traceback.format_exc().strip().splitlines()[-3:]
            pipe.send(failed(name, f"{type(error).__name__}: {str(error)[:200]} {' '.join(where)[:300]}"))


def failed(name: str, reason: str) -> dict[str, Any]:
    """Return the row of an architecture that could not be examined."""
    return {"name": name, "class": "", "seconds": 0.0, "verdicts": {"build": ["broken", reason]}}


class Worker:
    """One process, started when it is needed and again after a crash, a hang, or many architectures."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._done = 0

    def examine(self, name: str) -> dict[str, Any]:
        """Return an architecture's row, or one that says how its process ended."""
        pipe = self._start()
        try:
            pipe.send(name)
            if pipe.poll(self.seconds):
                row: dict[str, Any] = pipe.recv()
                self._done += 1
                if self._done >= RENEWED:
                    self.stop()
                return row
            reason = f"took longer than {self.seconds:g} s"
        except (EOFError, OSError):
            reason = "its process died"
        self.stop()
        return failed(name, reason)

    def _start(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=serve, args=(other,), daemon=True)
            self._process.start()
            other.close()
            self._done = 0
        return self._pipe

    def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None
