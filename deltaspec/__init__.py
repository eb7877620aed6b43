"""deltaspec: what did fine-tuning change? Singular-value spectra of weight deltas."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.errors import DeltaspecError
    from deltaspec.options import AnalyzeOptions
    from deltaspec.spectra.metrics import METRICS
    from deltaspec.store.run import Run
    from deltaspec.workflows.analyze import analyze
    from deltaspec.workflows.plot import plot

__all__ = ["METRICS", "AnalyzeOptions", "DeltaspecError", "Run", "analyze", "plot"]

_HOMES = {
    "METRICS": "deltaspec.spectra.metrics",
    "AnalyzeOptions": "deltaspec.options",
    "DeltaspecError": "deltaspec.errors",
    "Run": "deltaspec.store.run",
    "analyze": "deltaspec.workflows.analyze",
    "plot": "deltaspec.workflows.plot",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing deltaspec loads no torch."""
    if name not in _HOMES:
        message = f"module 'deltaspec' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
