"""Errors a user can act on: one sentence naming file and tensor, what was found and what to do."""

from __future__ import annotations

import importlib
import re
from types import ModuleType


class DeltaspecError(Exception):
    """Base of every error that deltaspec raises on purpose; the command line prints it without a traceback."""


class OptionError(DeltaspecError):
    """An option's value makes no sense."""


class CheckpointError(DeltaspecError):
    """A checkpoint or adapter is missing, damaged or in a format that cannot be read."""


class PairingError(DeltaspecError):
    """Base and tuned do not belong together."""


class MismatchError(PairingError):
    """Two tensors of one name have other shapes; which options help depends on the command.

    Parameters
    ----------
    what : str
        The sentence without advice.
    name : str
        The first such tensor.
    vocabulary : bool
        Whether rows of a vocabulary may differ, which --vocab common allows.
    """

    def __init__(self, what: str, name: str, *, vocabulary: bool) -> None:
        self.what, self._name, self._vocabulary = what, name, vocabulary
        super().__init__(self.advise(vocab=True, exclude=True))

    def advise(self, *, vocab: bool = False, exclude: bool = False) -> str:
        """Return the sentence with advice for a command that has --vocab, --exclude, both or neither."""
        common = vocab and self._vocabulary
        advice = "Pass --vocab common to compare the shared rows" if common else ""
        advice = advice or "Check that the base is the one this model was tuned from"
        if exclude:
            pattern = "" if common else f" '{re.escape(self._name)}'"
            advice += f", or leave it out with --exclude{pattern}"
        return f"{self.what} {advice}."


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
