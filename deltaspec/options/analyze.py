"""What ``analyze`` computes, and where."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from deltaspec.errors import OptionError

SPECTRA = ("delta", "base", "tuned")
VOCABULARIES = ("strict", "common")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?(,cuda:\d+)*")


@dataclass(frozen=True, slots=True)
class AnalyzeOptions:
    """What ``analyze`` computes and where.

    Parameters
    ----------
    device : str
        ``auto`` (every CUDA device, else the CPU), ``cpu``, ``cuda``, or a list such as ``cuda:0,cuda:1``.
    include, exclude : str
        Regular expressions searched in tensor names; empty includes everything, excludes nothing.
    spectra : tuple of str
        Which matrices are decomposed: any of delta, base, tuned.
    vectors : int
        How many top singular triplets to keep beside the values.
    exact : bool
        QR and an fp64 SVD instead of the Gram matrix: slower, accurate to eps·σ₁ for the smallest values too.
    vocab : str
        ``strict`` refuses embeddings whose row counts differ; ``common`` compares the rows that both have.
    workers : int
        Matrices in flight on the CPU; 0 takes the number of usable cores.
    memory : int
        Bytes that matrices in flight may take together; 0 takes 4 × the largest matrix in float64 + 48 MB.
    """

    device: str = "auto"
    include: str = ""
    exclude: str = ""
    spectra: tuple[str, ...] = ("delta",)
    vectors: int = 0
    exact: bool = False
    vocab: str = "strict"
    workers: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if not DEVICE.fullmatch(self.device):
            message = f"--device is '{self.device}': expected auto, cpu, cuda, or a list such as cuda:0,cuda:1."
            raise OptionError(message)
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name))
            except re.error as cause:
                message = f"--{name} '{getattr(self, name)}' is not a regular expression: {cause}."
                raise OptionError(message) from cause
        if isinstance(self.spectra, str):
            message = f"spectra is '{self.spectra}': expected a tuple, such as ('{self.spectra}',)."
            raise OptionError(message)
        unknown = [name for name in self.spectra if name not in SPECTRA]
        if unknown or not self.spectra or len(set(self.spectra)) < len(self.spectra):
            message = f"--spectra is '{','.join(self.spectra)}': expected some of {', '.join(SPECTRA)}, each once."
            raise OptionError(message)
        if self.vocab not in VOCABULARIES:
            message = f"--vocab is '{self.vocab}': expected {' or '.join(VOCABULARIES)}."
            raise OptionError(message)
        for name in ("vectors", "workers", "memory"):
            if getattr(self, name) < 0:
                message = f"--{name} is {getattr(self, name)}: expected 0 or more."
                raise OptionError(message)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what a run holds; a run is resumed only when these are the same."""
        fields = asdict(self)
        for name in ("workers", "memory"):
            del fields[name]
        return {**fields, "spectra": sorted(self.spectra)}
