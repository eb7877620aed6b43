"""What can be chosen of methods that put learned tokens before the text."""

from __future__ import annotations

from dataclasses import dataclass

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option


@documented
@dataclass(frozen=True, slots=True)
class VirtualOptions:
    """How many virtual tokens."""

    tokens: int = option(20, "Number of virtual tokens before the text.")

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.tokens < 1:
            message = f"--tokens is {self.tokens}: expected 1 or more."
            raise OptionError(message)
