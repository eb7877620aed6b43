"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from deltaspec.errors import RunError

LEFTOVER = re.compile(r".*\.(safetensors|json)\.([0-9]+)\.tmp")
Refusal = Callable[[Path, OSError], RunError]


def unwritten(path: Path, cause: OSError) -> RunError:
    """Return the error for what the system refused to write."""
    message = f"Cannot write '{path}' ({cause.strerror or cause}): free space or rights there, then run it again."
    return RunError(message)


@contextmanager
def whole_file(path: Path, *, durable: bool = True, refusal: Refusal = unwritten) -> Iterator[BinaryIO]:
    """Open a neighbour of ``path`` for writing, and rename it once the block has ended well.

    Parameters
    ----------
    path : Path
        Replaced if it is there; folders around it are made.
    durable : bool
        Wait until the disk has it (5 to 10 ms), so that not even a power cut leaves a torn file under the name; some
        file systems report a full disk only then. Without, it is for small files of which a damaged one counts as
        missing: thousands of records.
    refusal : callable
        From ``path`` and what the system said to the error that is raised.

    Raises
    ------
    RunError
        If the system refuses, for example on a full disk; the neighbour is deleted then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "inside" / "note.txt") as stream:
    ...         _ = stream.write(b"whole")
    ...     print([path.name for path in Path(folder, "inside").iterdir()])
    ['note.txt']
    """
    temporary = _neighbour(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as cause:
        raise refusal(path, cause) from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, *, durable: bool = True, refusal: Refusal = unwritten) -> None:
    """Write a file whole or not at all; see ``whole_file``."""
    with whole_file(path, durable=durable, refusal=refusal) as stream:
        stream.write(content)


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Make a neighbour of ``place`` to be filled, and rename it once the block has ended well.

    Parameters
    ----------
    place : Path
        Replaced if it is there; folders around it are made.

    Raises
    ------
    RunError
        If the system refuses; the neighbour is deleted then.
    """
    temporary = _neighbour(place)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if place.exists():
            shutil.rmtree(place)
        temporary.rename(place)
    except OSError as cause:
        raise unwritten(place, cause) from cause
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _neighbour(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def is_leftover(path: Path) -> bool:
    """Tell whether a file is what a write that was killed left behind: ours, and its process gone."""
    match = LEFTOVER.fullmatch(path.name)
    return match is not None and (int(match[2]) == os.getpid() or not is_alive(int(match[2])))


def is_alive(process: int) -> bool:
    """Tell whether a process of this number runs, whosever it is."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
