"""What ``compare`` measures."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.analyze import EXCLUDE, INCLUDE, ONE_DEVICE, AnalyzeOptions
from deltaspec.options.option import documented, option


@documented
@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What ``compare`` measures."""

    directions: int = option(
        8, "Top singular vectors of each ΔW that are compared with those of full fine-tuning, and with the base."
    )
    intruders: bool = option(True, "Count intruder dimensions: three decompositions of each matrix more.")
    include: str = option("", INCLUDE, metavar="REGEX")
    exclude: str = option("", EXCLUDE, metavar="REGEX")
    device: str = option("auto", ONE_DEVICE)

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if self.directions < 1:
            message = f"--directions is {self.directions}: expected 1 or more."
            raise OptionError(message)
        self.analysis()

    def analysis(self) -> AnalyzeOptions:
        """Return how each ΔW is decomposed."""
        return AnalyzeOptions(include=self.include, exclude=self.exclude, vectors=self.directions, device=self.device)
