"""deltaspec: what fine-tuning changed, as singular-value spectra and as LoRA adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.errors import DeltaspecError
    from deltaspec.options import (
        AnalyzeOptions,
        CalibrateOptions,
        CompareOptions,
        DataOptions,
        ExtractOptions,
        FormOptions,
        LoopOptions,
        MergeOptions,
        RankOptions,
        RunOptions,
        TargetOptions,
    )
    from deltaspec.spectra.metrics import METRICS
    from deltaspec.store.run import Run
    from deltaspec.store.trajectory import Trajectory
    from deltaspec.training.methods import METHODS
    from deltaspec.training.mixed import MixedBatch
    from deltaspec.training.switch import Adapters
    from deltaspec.workflows.adapters import load_adapter, save_adapter
    from deltaspec.workflows.analyze import analyze
    from deltaspec.workflows.calibrate import calibrate
    from deltaspec.workflows.combine import combine
    from deltaspec.workflows.compare import compare, draw_comparison
    from deltaspec.workflows.count import count
    from deltaspec.workflows.extract import extract
    from deltaspec.workflows.live import analyze_live
    from deltaspec.workflows.merge import merge
    from deltaspec.workflows.plot import plot
    from deltaspec.workflows.train import train
    from deltaspec.workflows.trajectory import trajectory
    from deltaspec.workflows.verify import verify

_HOMES = {
    "METHODS": "deltaspec.training.methods",
    "METRICS": "deltaspec.spectra.metrics",
    "Adapters": "deltaspec.training.switch",
    **dict.fromkeys(
        (
            *("AnalyzeOptions", "CalibrateOptions", "CompareOptions", "DataOptions", "ExtractOptions", "FormOptions"),
            *("LoopOptions", "MergeOptions", "RankOptions", "RunOptions", "TargetOptions"),
        ),
        "deltaspec.options",
    ),
    "DeltaspecError": "deltaspec.errors",
    "MixedBatch": "deltaspec.training.mixed",
    "Run": "deltaspec.store.run",
    "Trajectory": "deltaspec.store.trajectory",
    "analyze_live": "deltaspec.workflows.live",
    "draw_comparison": "deltaspec.workflows.compare",
    **dict.fromkeys(("load_adapter", "save_adapter"), "deltaspec.workflows.adapters"),
    **{
        name: f"deltaspec.workflows.{name}"
        for name in (
            *("analyze", "calibrate", "combine", "compare", "count", "extract", "merge", "plot", "train"),
            *("trajectory", "verify"),
        )
    },
}

__all__ = [
    "METHODS",
    "METRICS",
    "Adapters",
    "AnalyzeOptions",
    "CalibrateOptions",
    "CompareOptions",
    "DataOptions",
    "DeltaspecError",
    "ExtractOptions",
    "FormOptions",
    "LoopOptions",
    "MergeOptions",
    "MixedBatch",
    "RankOptions",
    "Run",
    "RunOptions",
    "TargetOptions",
    "Trajectory",
    "analyze",
    "analyze_live",
    "calibrate",
    "combine",
    "compare",
    "count",
    "draw_comparison",
    "extract",
    "load_adapter",
    "merge",
    "plot",
    "save_adapter",
    "train",
    "trajectory",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing deltaspec loads no torch."""
    if name not in _HOMES:
        message = f"module 'deltaspec' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
