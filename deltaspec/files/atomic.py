"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from deltaspec.errors import RunError

LEFTOVER = re.compile(r".*\.(safetensors|json)\.([0-9]+)\.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a neighbour of ``path`` for writing, and rename it once the block has ended well.

    Raises
    ------
    RunError
        If the system refuses, for example on a full disk; the neighbour is deleted then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # some file systems report a full disk only here
        temporary.replace(path)
    except OSError as cause:
        raise unwritten(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


def unwritten(path: Path, cause: OSError) -> RunError:
    """Return the error for what the system refused to write."""
    message = f"Cannot write '{path}' ({cause.strerror or cause}): free space or rights there, then run it again."
    return RunError(message)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def is_leftover(path: Path) -> bool:
    """Tell whether a file is what a write that was killed left behind: ours, and its process gone."""
    match = LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    try:
        os.kill(int(match[2]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return int(match[2]) == os.getpid()
