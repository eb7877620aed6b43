"""What a run directory is called, and what its manifest says of the machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from deltaspec.store.formats.run import Environment
from deltaspec.store.run import Run, unwritable
from deltaspec.types import PlainFields, SourceIdentity


def describe_environment() -> Environment:
    """Say which versions and machine compute here, as a run's manifest does."""
    versions = {name: version(name) for name in ("deltaspec", "torch", "numpy", "safetensors")}
    return {
        "deltaspec": versions["deltaspec"],
        "versions": {**versions, "python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
    }


@contextmanager
def writing(run: Run) -> Iterator[None]:
    """Turn what the system refuses to write into a run into the sentence that says so; RunError.

    Parameters
    ----------
    run : Run
    """
    try:
        yield
    except OSError as cause:
        raise unwritable(run.path, cause) from cause


def default_path(base: SourceIdentity, tuned: SourceIdentity, options: PlainFields) -> Path:
    """Name a run directory after both sides, with a hash of contents and options, so that two never collide."""
    names = [side["ref"].rstrip("/").split("/")[-1] or "model" for side in (base, tuned)]
    identity = [base["files"], tuned["files"], options]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{names[0]}--{names[1]}-{digest}"
