"""How bench_gpu.py times a case, compares its result and notes it down."""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu import candidates
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What one call does, for the rate: operations or bytes, on how many items; and whether a first call warms up."""

    operations: float = 0.0
    nbytes: int = 0
    items: int = 1
    warm: bool = True

    def rate(self, seconds: float) -> str:
        """Say operations or bytes per second."""
        if self.operations:
            return f"{self.operations / seconds / 1e12:.1f} TFLOP/s"
        return f"{self.nbytes / seconds / 1e9:.1f} GB/s" if self.nbytes else ""


@dataclass
class Bench:
    """Where one section runs, until when, and the rows it has printed."""

    section: str
    smoke: bool
    deadline: float
    table: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """The card, or the CPU for a smoke test."""
        return "cpu" if self.smoke else "cuda"

    @property
    def sides(self) -> tuple[int, int, int]:
        """Small, medium and large."""
        return (64, 128, 192) if self.smoke else (1024, 2048, 4096)

    def left(self) -> float:
        """Seconds until the section's limit."""
        return self.deadline - (time.monotonic() - self.started)

    def wait(self) -> None:
        """Wait for the card."""
        if not self.smoke:
            torch.cuda.synchronize()

    def time(self, function: Callable[[], object], repeats: int) -> float:
        """Median seconds of a few calls."""
        seconds = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            seconds.append(time.perf_counter() - start)
            if self.left() < 5:
                break
        return sorted(seconds)[len(seconds) // 2]

    def measure(
        self,
        case: str,
        way: Callable[[], Any],
        *,
        of: Work = Work(),
        judge: Callable[[Any], str] = lambda _: "",
    ) -> None:
        """Time one way and judge what it returns; a failure becomes its row, and nothing is begun at the limit."""
        if self.left() < 3:
            self.row(case, accuracy="no time left")
            return
        try:
            found: list[Any] = []
            seconds = self.time(lambda: found.append(way()), 1)
            if of.warm:
                seconds = self.time(way, 3 if seconds < 0.3 else 1)
            self.row(case, seconds / of.items, of.rate(seconds), judge(found[0]))
        except Exception as cause:  # whatever one library cannot do, the others are still measured
            self.row(case, accuracy=f"{type(cause).__name__}: {str(cause).splitlines()[0][:110]}")

    def peak(self, function: Callable[[], object]) -> str:
        """Memory of the card that a call takes beyond what is taken."""
        if self.smoke:
            return ""
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.wait()
        return f"+{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB"

    def row(self, case: str, seconds: float | None = None, rate: str = "", accuracy: str = "") -> None:
        """Print a row and append it to the table."""
        shown = "" if seconds is None else f"{seconds * 1e3:.2f}"
        print(f"{case:60s} {shown:>10s} ms  {rate:24s} {accuracy}", flush=True)
        with self.table.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow((self.section, case, shown, rate, accuracy))

    def delta(self, kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
        """Make a change, float32, on the device."""
        return candidates.delta(kind, rows, columns, self.device, seed)


def to_values(eigenvalues: Tensor) -> Tensor:
    """σ, descending, from ascending eigenvalues of a Gram matrix."""
    return eigenvalues.double().clamp_min(0).sqrt().flip(-1)


def compare(values: Tensor, exact: Tensor) -> str:
    """Say how far values are from exact ones."""
    values, exact = values.double().cpu(), exact.double().cpu()
    error, kept = (values - exact).abs(), exact > 1e-3 * exact[0]
    return f"of σ₁ {float(error.max() / exact[0]):.1e}; relative {float((error[kept] / exact[kept]).max()):.1e}"
