"""Rows of the pieces that a killed extraction goes on from: one factorised matrix, or one spectrum, each."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class LabelRow(TypedDict):
    """One matrix in one of several adapters, as FactorsRow has it."""

    rank: int
    error: float
    optimum: float
    weighted_error: NotRequired[float]
    weighted_optimum: NotRequired[float]


class FactorisedRow(TypedDict):
    """One factorised matrix, with its results by label; other fields as of FactorsRow.

    ``wanted`` is what was asked for: a piece that answers something else is computed again.
    """

    matrix: str
    tensor: str
    part: str
    role: str
    depth: int | None
    expert: int | None
    shape: list[int]
    energy: float
    method: str
    excess: float
    results: dict[str, LabelRow]
    base_energy: float | None
    rounding_share: NotRequired[float]
    seconds: float
    wanted: NotRequired[dict[str, object]]


class SpectrumRow(TypedDict):
    """What stands beside the singular values of one ΔW: ‖W‖²."""

    base_energy: float
    wanted: NotRequired[dict[str, object]]
