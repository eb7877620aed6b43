"""What ``deltaspec.json`` beside an adapter's weights holds: where it comes from, and how good it is."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

FORMAT, VERSION = "deltaspec-adapter", 1


class Provenance(TypedDict):
    """What an adapter was made from: two checkpoints, or adapters with their weights.

    ``base``, ``tuned`` and ``adapters`` are as ``io.open.identify_source`` has them.
    """

    base: dict[str, Any]
    tuned: NotRequired[dict[str, Any]]
    adapters: NotRequired[list[dict[str, Any]]]
    options: dict[str, Any]
    deltaspec: NotRequired[str]


class LabelResult(TypedDict):
    """One matrix in one adapter.

    ``error`` = ‖ΔW - BA‖/‖ΔW‖ of the factors as stored, and ``optimum`` the least at this rank; ``weighted_…`` the same
    of ‖(ΔW - BA)X‖ over the inputs X of a calibration.
    """

    rank: int
    error: float
    optimum: float
    weighted_error: NotRequired[float]
    weighted_optimum: NotRequired[float]


class Factorised(TypedDict):
    """One matrix, whatever its rank.

    ``energy`` = ‖ΔW‖² and ``base_energy`` = ‖W‖², squared units of the weights, the latter None where there is no W;
    ``excess`` says by what share the error may exceed the optimum; ``rounding_share`` is what storage rounding explains
    of the energy.
    """

    matrix: str
    tensor: str
    part: str
    role: str
    depth: int | None
    expert: int | None
    shape: tuple[int, int]
    energy: float
    method: str
    excess: float
    base_energy: float | None
    rounding_share: NotRequired[float]


class MatrixRow(Factorised):
    """One matrix as its piece stores it, with its results in each of several adapters."""

    results: dict[str, LabelResult]
    seconds: float
    wanted: NotRequired[dict[str, Any]]


class MatrixReport(Factorised, LabelResult):
    """One matrix of one adapter."""


class ModuleReport(TypedDict):
    """One module as it was written; ``kind`` as of ModulePair."""

    rank: int
    kind: str
    bias: bool


class NotCarried(TypedDict):
    """A tensor that changed and is not in the adapter; ``share`` is its share of ‖Δ‖², None where it has no Δ."""

    tensor: str
    role: str
    share: float | None
    reason: str


class ReportTotals(TypedDict):
    """Sums over all matrices; ``kept`` is the share of ‖Δ‖² of everything that changed, also beside the factors."""

    matrices: int
    parameters: int
    bytes: int
    energy: float
    error: float
    optimum: float
    share_in_matrices: float
    kept: float


class BudgetReport(TypedDict):
    """What a budget of parameters bought: how much of it was spent, and at one rank for all or at most what lost."""

    budget: int
    spent: int
    uniform: int | None
    loss_bound: float | None


class AdapterReport(Provenance):
    """The whole file. Fields may be added by later versions; none changes its meaning."""

    format: str
    version: int
    label: str
    dtype: str
    target: str
    notes: list[str]
    modules: dict[str, ModuleReport]
    matrices: list[MatrixReport]
    whole: list[str]
    unchanged: list[str]
    not_carried: list[NotCarried]
    totals: ReportTotals
    grown: dict[str, int]
    tied: list[str]
    budget: BudgetReport | None
