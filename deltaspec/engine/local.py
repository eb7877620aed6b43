"""Many items in flight on one machine: a thread for each worker, one BLAS thread for each item, a memory budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from threadpoolctl import threadpool_limits

from deltaspec.errors import OptionError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T, R]):
    """One item's end: its value, or the exception that stopped it."""

    item: T
    value: R | None
    failure: Exception | None


def resolve_devices(device: str, workers: int = 0) -> list[torch.device]:
    """Return one device for each worker: on the CPU as many as usable cores, on CUDA one for each card.

    Parameters
    ----------
    device : str
        ``auto``, ``cpu``, ``cuda`` or a list such as ``cuda:0,cuda:1``.
    workers : int
        Workers on the CPU; 0 takes the number of usable cores.

    Raises
    ------
    OptionError
        If a CUDA device is asked for that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [torch.device("cpu")] * (workers or cores)
    names = [f"cuda:{i}" for i in range(count)] if device in ("auto", "cuda") else device.split(",")
    devices = [torch.device(name) for name in names]
    if not devices or any((d.index or 0) >= count for d in devices):
        message = f"--device is '{device}', but torch sees {count} CUDA devices here: pass --device cpu or auto."
        raise OptionError(message)
    return devices


@dataclass(slots=True)
class _Flight(Generic[T, R]):
    """Items that wait, devices that are free, and what is under way, within a budget of bytes."""

    waiting: list[T]
    free: list[torch.device]
    cost: Callable[[T], int]
    budget: int
    flying: dict[Future[R], tuple[T, torch.device, int]] = field(default_factory=dict)
    retried: set[int] = field(default_factory=set)

    def _needs(self, item: T) -> int:
        return self.budget if id(item) in self.retried else self.cost(item)

    def start(self, pool: ThreadPoolExecutor, function: Callable[[T, torch.device], R]) -> None:
        """Give every free device the first item that fits beside what is under way; where nothing is, any item fits."""
        while self.waiting and self.free:
            used = sum(needed for *_, needed in self.flying.values())
            fits = (i for i, item in enumerate(self.waiting) if used + self._needs(item) <= self.budget)
            chosen = next(fits, None)
            if chosen is None and self.flying:
                break
            item, device = self.waiting.pop(chosen or 0), self.free.pop()
            self.flying[pool.submit(function, item, device)] = (item, device, self._needs(item))

    def land(self, future: Future[R]) -> Outcome[T, R] | None:
        """Return an item's end; None where it waits for a second try alone, out of CUDA memory the first time."""
        item, device, _ = self.flying.pop(future)
        self.free.append(device)
        failure = future.exception()
        if isinstance(failure, torch.OutOfMemoryError) and id(item) not in self.retried:
            self.retried.add(id(item))
            torch.cuda.empty_cache()
            self.waiting.append(item)
            return None
        if failure is not None and not isinstance(failure, Exception):
            raise failure
        return Outcome(item, None if failure else future.result(), failure)


def run(
    items: Sequence[T],
    function: Callable[[T, torch.device], R],
    *,
    devices: Sequence[torch.device],
    cost: Callable[[T], int],
    budget: int,
) -> Iterator[Outcome[T, R]]:
    """Map ``function`` over items and yield outcomes as they end; start them in the order given.

    Parameters
    ----------
    items : sequence
        Largest first keeps the last worker busy.
    function : callable
        Called as ``function(item, device)``; an exception becomes the outcome's failure. Out of CUDA memory, an item
        runs once more when nothing else is in flight.
    devices : sequence of torch.device
        One for each worker; on the CPU each is given one BLAS thread, which beats several threads on one matrix.
    cost : callable
        Bytes that an item needs while in flight.
    budget : int
        Bytes in flight together; an item larger than the budget runs alone.
    """
    flight: _Flight[T, R] = _Flight(list(items), list(devices), cost, budget)
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(len(devices), initializer=torch.set_num_threads, initargs=(1,))
    with threadpool_limits(1), workers as pool:
        try:
            while flight.waiting or flight.flying:
                flight.start(pool, function)
                for future in wait(flight.flying, return_when=FIRST_COMPLETED).done:
                    if outcome := flight.land(future):
                        yield outcome
        finally:
            for future in flight.flying:
                future.cancel()
            torch.set_num_threads(threads)  # a worker's setting reaches MKL in the whole process
