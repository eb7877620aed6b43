"""What ``analyze`` computes, and where."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option
from deltaspec.options.pairing import PairOptions

SPECTRA = ("delta", "base", "tuned")
VOCABULARIES = ("strict", "common")
ONE_DEVICE = "Where to compute: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:1."
INCLUDE = "Only tensors in whose name this regular expression is found; empty takes all."
EXCLUDE = "No tensors in whose name this regular expression is found; empty leaves none out."
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?(,cuda:\d+)*")


@documented
@dataclass(frozen=True, slots=True)
class AnalyzeOptions:
    """What ``analyze`` computes, and where."""

    device: str = option(
        "auto", "Where to compute: auto (every CUDA device, else the CPU), cpu, cuda, or a list: cuda:0,cuda:1."
    )
    include: str = option("", INCLUDE, metavar="REGEX")
    exclude: str = option("", EXCLUDE, metavar="REGEX")
    spectra: tuple[str, ...] = option(
        ("delta",), "Which matrices to decompose: some of delta (the change), base and tuned.", metavar="X[,X…]"
    )
    vectors: int = option(
        0,
        "Keep the left and right singular vectors of the K strongest directions, beside all σ.",
        metavar="K",
    )
    exact: bool = option(
        False,
        "Decompose by QR and a float64 SVD instead of the Gram matrix: slower, and right for singular values below a "
        "millionth of the largest too.",
    )
    vocab: str = option(
        "strict",
        "What to do where vocabularies differ in size: strict refuses the embeddings, common compares the rows that "
        "both have.",
    )
    workers: int = option(0, "Matrices in flight at once on the CPU; 0: one for each core.")
    memory: int = option(
        0,
        "Memory that matrices in flight may take together; 0: enough for the largest matrix, several times over.",
        metavar="BYTES",
    )
    pairing: PairOptions = field(default_factory=PairOptions)

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
        for name in ("workers", "memory", "pairing"):
            del fields[name]
        return {**fields, "spectra": sorted(self.spectra), **self.pairing.identity()}
