"""Which versions of deltaspec compute the same: what one began, the other may finish."""

from __future__ import annotations

SAME: dict[str, str] = {"0.2.0": "0.1.0"}
"""Version → the first one that gives the same numbers, but for their last digits; one that changes any has no line."""


def numbers_of(version: str) -> str:
    """Return the first version that computes what this one does.

    Parameters
    ----------
    version : str
        As a manifest holds it.

    Examples
    --------
    >>> numbers_of("0.2.0")
    '0.1.0'
    """
    return SAME.get(version, version)
