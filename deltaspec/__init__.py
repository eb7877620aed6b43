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
        DataSources,
        ExtractOptions,
        FormOptions,
        LoopOptions,
        MergeOptions,
        PairOptions,
        RankOptions,
        Recipe,
        RunOptions,
        TargetOptions,
    )
    from deltaspec.spectra.metrics import METRICS
    from deltaspec.store.run import Run
    from deltaspec.store.trajectory import Trajectory
    from deltaspec.training.methods import METHODS
    from deltaspec.training.several.mixed_batch import MixedBatch
    from deltaspec.training.several.switching import Adapters
    from deltaspec.workflows.analysis.analyze import analyze
    from deltaspec.workflows.analysis.live import analyze_live
    from deltaspec.workflows.analysis.trajectory import trajectory
    from deltaspec.workflows.analysis.write_figures import plot
    from deltaspec.workflows.comparison.compare import compare, draw_comparison
    from deltaspec.workflows.extraction.calibrate import calibrate
    from deltaspec.workflows.extraction.combine import combine
    from deltaspec.workflows.extraction.extract import extract
    from deltaspec.workflows.merging.merge import merge
    from deltaspec.workflows.training.count import count
    from deltaspec.workflows.training.saved_adapters import load_adapter, save_adapter
    from deltaspec.workflows.training.train import train
    from deltaspec.workflows.verification.verify import verify

_HOMES = {
    name: home
    for home, names in {
        "deltaspec.errors": ("DeltaspecError",),
        "deltaspec.options": (
            *("AnalyzeOptions", "CalibrateOptions", "CompareOptions", "DataOptions", "DataSources", "ExtractOptions"),
            *("FormOptions", "LoopOptions", "MergeOptions", "PairOptions", "RankOptions", "Recipe"),
            *("RunOptions", "TargetOptions"),
        ),
        "deltaspec.spectra.metrics": ("METRICS",),
        "deltaspec.store.run": ("Run",),
        "deltaspec.store.trajectory": ("Trajectory",),
        "deltaspec.training.methods": ("METHODS",),
        "deltaspec.training.several.mixed_batch": ("MixedBatch",),
        "deltaspec.training.several.switching": ("Adapters",),
        "deltaspec.workflows.analysis.analyze": ("analyze",),
        "deltaspec.workflows.analysis.live": ("analyze_live",),
        "deltaspec.workflows.analysis.trajectory": ("trajectory",),
        "deltaspec.workflows.analysis.write_figures": ("plot",),
        "deltaspec.workflows.comparison.compare": ("compare", "draw_comparison"),
        "deltaspec.workflows.extraction.calibrate": ("calibrate",),
        "deltaspec.workflows.extraction.combine": ("combine",),
        "deltaspec.workflows.extraction.extract": ("extract",),
        "deltaspec.workflows.merging.merge": ("merge",),
        "deltaspec.workflows.training.count": ("count",),
        "deltaspec.workflows.training.saved_adapters": ("load_adapter", "save_adapter"),
        "deltaspec.workflows.training.train": ("train",),
        "deltaspec.workflows.verification.verify": ("verify",),
    }.items()
    for name in names
}

__all__ = [
    "METHODS",
    "METRICS",
    "Adapters",
    "AnalyzeOptions",
    "CalibrateOptions",
    "CompareOptions",
    "DataOptions",
    "DataSources",
    "DeltaspecError",
    "ExtractOptions",
    "FormOptions",
    "LoopOptions",
    "MergeOptions",
    "MixedBatch",
    "PairOptions",
    "RankOptions",
    "Recipe",
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
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("deltaspec")
    if name not in _HOMES:
        message = f"module 'deltaspec' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
