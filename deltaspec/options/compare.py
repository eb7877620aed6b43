"""What ``compare`` measures."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.analyze import AnalyzeOptions


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """What ``compare`` measures.

    Parameters
    ----------
    directions : int
        Top singular vectors of each ΔW that are compared with full fine-tuning's, and with the base.
    intruders : bool
        Count intruder dimensions: three decompositions of each matrix more.
    include, exclude : str
        Regular expressions searched in the base's tensor names.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
    """

    directions: int = 8
    intruders: bool = True
    include: str = ""
    exclude: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if self.directions < 1:
            message = f"--directions is {self.directions}: expected 1 or more."
            raise OptionError(message)
        self.analysis()

    def analysis(self) -> AnalyzeOptions:
        """Return how each ΔW is decomposed."""
        return AnalyzeOptions(include=self.include, exclude=self.exclude, vectors=self.directions, device=self.device)
