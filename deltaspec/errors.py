"""Errors a user can act on: one sentence naming file and tensor, what was found and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


class DeltaspecError(Exception):
    """Base of every error that deltaspec raises on purpose; the command line prints it without a traceback."""


class OptionError(DeltaspecError):
    """An option's value makes no sense."""


class CheckpointError(DeltaspecError):
    """A checkpoint or adapter is missing, damaged or in a format that cannot be read."""


class PairingError(DeltaspecError):
    """Base and tuned do not belong together."""


class NumericalError(DeltaspecError):
    """A matrix holds NaN or infinity, or a decomposition did not converge."""


class RunError(DeltaspecError):
    """A run directory is damaged, or belongs to other checkpoints or options."""


class MissingPackageError(DeltaspecError):
    """An optional package is needed and not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which command installs it.

    Parameters
    ----------
    module : str
        Name to import, for example ``"pandas"``.
    extra : str
        The extra of deltaspec that brings it.

    Raises
    ------
    MissingPackageError
        If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        message = (
            f"This needs the package '{module}', which is not installed: run pip install 'deltaspec[{extra}]', "
            f"or pip install '.[{extra}]' in a clone."
        )
        raise MissingPackageError(message) from cause
