"""METHODS, the one table of training methods; each line is one file."""

from __future__ import annotations

from deltaspec.training.attachment import Method
from deltaspec.training.methods import lora

METHODS: dict[str, Method] = {
    "lora": lora.METHOD,
}
