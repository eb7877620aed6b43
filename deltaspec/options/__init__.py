"""One options dataclass per workflow; standard library only, so that the command line starts without torch."""

from deltaspec.options.adapters import (
    BUDGETS,
    DTYPES,
    EXTRAS,
    POLICIES,
    TARGETS,
    ExtractOptions,
    FormOptions,
    MergeOptions,
    RankOptions,
)
from deltaspec.options.analyze import AnalyzeOptions
from deltaspec.options.models import CalibrateOptions, TextOptions
from deltaspec.options.training import TargetOptions

__all__ = [
    "BUDGETS",
    "DTYPES",
    "EXTRAS",
    "POLICIES",
    "TARGETS",
    "AnalyzeOptions",
    "CalibrateOptions",
    "ExtractOptions",
    "FormOptions",
    "MergeOptions",
    "RankOptions",
    "TargetOptions",
    "TextOptions",
]
