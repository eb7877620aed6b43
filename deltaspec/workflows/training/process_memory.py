"""The memory that a process held at most, and whether it ran out."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Forget what this process held at most before, where the system can (CUDA; Linux's VmHWM)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        gc.collect()
        with suppress(OSError, AttributeError):  # what is free, but not given back yet, would count
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            RESET.write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the bytes that this process held at most: on a CUDA device, of its memory, else of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.exists():
        peak = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), "")
        if peak:
            return int(peak.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def ran_out(cause: Exception) -> bool:
    """Tell whether an error says that memory ran out; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(cause, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(cause)
