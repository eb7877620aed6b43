"""deltaspec: what fine-tuning changed, as singular-value spectra and as LoRA adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.errors import DeltaspecError
    from deltaspec.options import (
        AnalyzeOptions,
        CalibrateOptions,
        ExtractOptions,
        FormOptions,
        MergeOptions,
        RankOptions,
    )
    from deltaspec.spectra.metrics import METRICS
    from deltaspec.store.run import Run
    from deltaspec.workflows.analyze import analyze
    from deltaspec.workflows.calibrate import calibrate
    from deltaspec.workflows.combine import combine
    from deltaspec.workflows.extract import extract
    from deltaspec.workflows.merge import merge
    from deltaspec.workflows.plot import plot
    from deltaspec.workflows.verify import verify

__all__ = [
    "METRICS",
    "AnalyzeOptions",
    "CalibrateOptions",
    "DeltaspecError",
    "ExtractOptions",
    "FormOptions",
    "MergeOptions",
    "RankOptions",
    "Run",
    "analyze",
    "calibrate",
    "combine",
    "extract",
    "merge",
    "plot",
    "verify",
]

_HOMES = {
    "METRICS": "deltaspec.spectra.metrics",
    **dict.fromkeys(
        ("AnalyzeOptions", "CalibrateOptions", "ExtractOptions", "FormOptions", "MergeOptions", "RankOptions"),
        "deltaspec.options",
    ),
    "DeltaspecError": "deltaspec.errors",
    "Run": "deltaspec.store.run",
    **{
        name: f"deltaspec.workflows.{name}"
        for name in ("analyze", "calibrate", "combine", "extract", "merge", "plot", "verify")
    },
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing deltaspec loads no torch."""
    if name not in _HOMES:
        message = f"module 'deltaspec' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
