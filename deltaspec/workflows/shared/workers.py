"""Where work on many matrices runs, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from deltaspec.types import Step

OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Workers:
    """Who does the work: one worker for each device.

    Attributes
    ----------
    devices : sequence of torch.device
        One for each worker; the same one several times means several workers on it.
    memory : int
        Bytes that all items in flight may take together; 0 takes what the largest item needs, several times.
    progress : callable, optional
        Called with a Step after each item.
    """

    devices: Sequence[torch.device]
    memory: int = 0
    progress: OnStep | None = None


class Headway:
    """Adds up what is done of some work, and tells each sum to whoever asked for it.

    Parameters
    ----------
    items, work : int
        What there is to do: how many items, and their work in any one unit.
    progress : callable, optional
        Called with a Step after each addition.

    Examples
    --------
    >>> headway = Headway(2, 30, lambda step: print(step.done, "of", step.total, step.work_done / step.work_total))
    >>> headway.add(work=15)
    1 of 2 0.5
    """

    def __init__(self, items: int, work: int, progress: OnStep | None) -> None:
        self._step, self._progress = Step(0, items, 0, 0, work, 0), progress

    def skip(self, items: int) -> None:
        """Count items as done without saying so: they were done before, or their work was counted already."""
        self._step = replace(self._step, done=self._step.done + items)

    def tell(self) -> None:
        """Say how far it is."""
        if self._progress:
            self._progress(self._step)

    def add(self, items: int = 1, *, work: int, weights: int | None = None, failed: bool = False) -> None:
        """Count items as done, and say how far it is.

        Parameters
        ----------
        items : int
        work : int
            Their work, in the unit of the whole.
        weights : int, optional
            How many matrix elements they have; by default ``work`` counts elements.
        failed : bool
            Whether they ended without a result.
        """
        before = self._step
        self._step = replace(
            before,
            done=before.done + items,
            failed=before.failed + failed,
            work_done=before.work_done + work,
            weights_done=before.weights_done + (work if weights is None else weights),
        )
        self.tell()
