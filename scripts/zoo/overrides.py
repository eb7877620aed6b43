"""Configurations that the rules do not get right: model type → fields that replace what they gave."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
