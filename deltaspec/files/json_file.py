"""Files that must hold one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises
    ------
    CheckpointError
        If it cannot be read, is not JSON, or is not an object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        message = f"Cannot read '{path}' as JSON ({cause}): download it again."
        raise CheckpointError(message) from cause
    if not isinstance(found, dict):
        message = f"Cannot use '{path}': expected a JSON object, found {type(found).__name__}; download it again."
        raise CheckpointError(message)
    return found
