"""One options dataclass per workflow; standard library only, so that the command line starts without torch."""

from deltaspec.options.adapters import (
    BUDGETS,
    DTYPES,
    EXTRAS,
    POLICIES,
    POLICY_HELP,
    TARGETS,
    ExtractOptions,
    FormOptions,
    MergeOptions,
    RankOptions,
)
from deltaspec.options.analyze import AnalyzeOptions
from deltaspec.options.compare import CompareOptions
from deltaspec.options.models import CalibrateOptions, TextOptions
from deltaspec.options.pairing import PairOptions
from deltaspec.options.recipe import DataSources, Recipe
from deltaspec.options.training import DataOptions, LoopOptions, RunOptions, TargetOptions

__all__ = [
    "BUDGETS",
    "DTYPES",
    "EXTRAS",
    "POLICIES",
    "POLICY_HELP",
    "TARGETS",
    "AnalyzeOptions",
    "CalibrateOptions",
    "CompareOptions",
    "DataOptions",
    "DataSources",
    "ExtractOptions",
    "FormOptions",
    "LoopOptions",
    "MergeOptions",
    "PairOptions",
    "RankOptions",
    "Recipe",
    "RunOptions",
    "TargetOptions",
    "TextOptions",
]
