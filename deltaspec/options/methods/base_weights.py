"""What can be chosen of methods that train the base's own weights."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option


@dataclass(frozen=True, slots=True)
class FullOptions:
    """Nothing to choose."""


@dataclass(frozen=True, slots=True)
class BitfitOptions:
    """Nothing to choose."""


@documented
@dataclass(frozen=True, slots=True)
class LastLayersOptions:
    """How much of the end of the model is trained."""

    blocks: int = option(2, "How many of the last blocks are trained, of each stack where a model has several.")
    head: bool = option(
        True,
        "Train everything outside the model's body too, and a pooler. A head that is tied to the embedding stays, and "
        "so does the last normalisation of the body.",
    )

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        if self.blocks < 0 or not (self.blocks or self.head):
            message = f"--blocks is {self.blocks}: expected one or more, or 0 together with the head."
            raise OptionError(message)
