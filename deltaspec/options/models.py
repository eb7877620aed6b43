"""Which text a model reads, and what is measured meanwhile."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.options.adapters import DTYPES
from deltaspec.options.analyze import DEVICE, AnalyzeOptions


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Which text a model reads, and how.

    Parameters
    ----------
    field : str
        The key of a .jsonl file, or the column of a .csv or .tsv file: a name of its first line, or a number from 1
        where the file has no such line.
    tokens : int
        At most so many tokens are read, from the beginning of the file.
    length : int
        Tokens of one sequence, at most as many as the model takes.
    batch : int
        Sequences of full length at once; of shorter ones as many as have the same number of tokens.
    device : str
        ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.
    """

    field: str = "text"
    tokens: int = 131072
    length: int = 512
    batch: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that make no sense, each with the option's name."""
        if not DEVICE.fullmatch(self.device) or "," in self.device:
            message = f"--device is '{self.device}': expected auto, cpu, cuda, or one such as cuda:1."
            raise OptionError(message)
        for name, least in (("tokens", 1), ("length", 2), ("batch", 1)):
            if getattr(self, name) < least:
                message = f"--{name} is {getattr(self, name)}: expected {least} or more."
                raise OptionError(message)


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What ``calibrate`` measures.

    Parameters
    ----------
    text : TextOptions
    include, exclude : str
        Regular expressions searched in the checkpoint's tensor names; empty includes everything, excludes nothing.
    dtype : str
        The model computes in bf16, fp16 or fp32; ``auto`` is the dtype it is stored in, but fp32 for fp16 on the CPU.
    memory : int
        Bytes of second moments (8·d_in² for each layer) held at once; the text is read once more for each group of
        layers that fits. Decides how long it takes, not what is written.
    """

    text: TextOptions = field(default_factory=TextOptions)
    include: str = ""
    exclude: str = ""
    dtype: str = "auto"
    memory: int = 4 << 30

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
