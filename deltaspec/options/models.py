"""Which text a model reads, and what is measured meanwhile."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.options.adapters import DTYPES
from deltaspec.options.analyze import DEVICE, EXCLUDE, INCLUDE, ONE_DEVICE, AnalyzeOptions
from deltaspec.options.option import documented, option


@documented
@dataclass(frozen=True, slots=True)
class TextOptions:
    """Which text a model reads, and how."""

    field: str = option(
        "text",
        "Where the text is: the key of a .jsonl file, or the column of a .csv or .tsv file, by name, or by number "
        "from 1 in a file without a line of names.",
    )
    tokens: int = option(131072, "At most so many tokens are read, from the beginning of the file.")
    length: int = option(512, "Tokens of one sequence, at most as many as the model takes.")
    batch: int = option(4, "Sequences of full length at once; shorter ones as many as have the same number of tokens.")
    device: str = option("auto", ONE_DEVICE)

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if not DEVICE.fullmatch(self.device) or "," in self.device:
            message = f"--device is '{self.device}': expected auto, cpu, cuda, or one such as cuda:1."
            raise OptionError(message)
        for name, least in (("tokens", 1), ("length", 2), ("batch", 1)):
            if getattr(self, name) < least:
                message = f"--{name} is {getattr(self, name)}: expected {least} or more."
                raise OptionError(message)


@documented
@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What ``calibrate`` measures."""

    text: TextOptions = field(default_factory=TextOptions)
    include: str = option("", INCLUDE, metavar="REGEX")
    exclude: str = option("", EXCLUDE, metavar="REGEX")
    dtype: str = option(
        "auto", "What the model computes in: bf16, fp16, fp32, or auto: as it is stored, but fp32 for fp16 on the CPU."
    )
    memory: int = option(
        4 << 30,
        "Moments (8·d_in² bytes for each layer) held at once; the text is read again for each group of layers that "
        "fits. Decides how long it takes, not what is written.",
        metavar="BYTES",
    )

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        AnalyzeOptions(include=self.include, exclude=self.exclude)
        if self.dtype not in DTYPES:
            message = f"--dtype is '{self.dtype}': expected {', '.join(DTYPES)}."
            raise OptionError(message)
        if self.memory < 1:
            message = f"--memory is {self.memory}: expected 1 or more."
            raise OptionError(message)

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what is written."""
        fields = asdict(self)
        del fields["memory"]
        return fields
