"""What every training method has: options, and PEFT's config where PEFT has the method."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, Protocol

PeftConfig = dict[str, Any]
"""The content of an adapter_config.json: plain data, by PEFT's names."""


class MethodOptions(Protocol):
    """A frozen dataclass; each method has one of its own."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
