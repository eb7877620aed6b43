"""Rows of the pieces that a killed extraction goes on from: one factorised matrix, or one spectrum, each."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from deltaspec.store.formats.adapter import Approximation, DecomposedMatrix


class FactorisedRow(DecomposedMatrix):
    """One factorised matrix, with its results by label.

    ``wanted`` is what was asked for: a piece that answers something else is computed again.
    """

    results: dict[str, Approximation]
    seconds: float
    wanted: NotRequired[dict[str, object]]


class SpectrumRow(TypedDict):
    """What stands beside the singular values of one ΔW: ‖W‖²."""

    base_energy: float
    wanted: NotRequired[dict[str, object]]
