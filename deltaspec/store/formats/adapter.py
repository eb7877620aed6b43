"""``deltaspec.json`` of an adapter, and of a merged checkpoint."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from deltaspec.types import OneSidedBlocks, PlainFields, SourceIdentity, WeightedSource


class NamedSource(TypedDict):
    """A base that was not read: what its adapters call it."""

    ref: str


class ExtractionIdentity(TypedDict):
    """What an adapter was made from: a base and a tuned model, or a base and the adapters of a sum."""

    base: SourceIdentity | NamedSource
    options: PlainFields
    tuned: NotRequired[SourceIdentity]
    adapters: NotRequired[list[WeightedSource]]
    deltaspec: NotRequired[str]


class ModuleRow(TypedDict):
    """One module with factors; ``kind`` as of AdapterModule."""

    rank: int
    kind: str
    bias: bool


class DecomposedMatrix(TypedDict):
    """One matrix's ΔW and how it was decomposed; energies are squared norms.

    ``rounding_share`` is of a ΔW between checkpoints.
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
    base_energy: float | None
    rounding_share: NotRequired[float]


class Approximation(TypedDict):
    """Factors of one rank: ``error`` and ``optimum`` are relative, of ‖ΔW‖; ``weighted_*`` as calibrated inputs see."""

    rank: int
    error: float
    optimum: float
    weighted_error: NotRequired[float]
    weighted_optimum: NotRequired[float]


class FactorsRow(DecomposedMatrix, Approximation):
    """One matrix with factors, as deltaspec.json lists it."""


class NotCarried(TypedDict):
    """A tensor that an adapter does not carry, with its share of ‖Δ‖², None where that is not known."""

    tensor: str
    role: str
    share: float | None
    reason: str


class AdapterTotals(TypedDict):
    """Sums over all matrices; ``kept`` is the share of ‖Δ‖² of everything that changed."""

    matrices: int
    parameters: int
    bytes: int
    energy: float
    error: float
    optimum: float
    share_in_matrices: float
    kept: float


class BudgetReport(TypedDict):
    """What a global budget bought, in parameters; ``uniform`` is the one rank that a target wants."""

    budget: int
    spent: int
    uniform: int | None
    loss_bound: float | None


class AdapterReport(ExtractionIdentity):
    """``deltaspec.json`` of an adapter that extract, combine or resize wrote."""

    format: str
    version: int
    label: str
    dtype: str
    target: str
    attachment: str
    notes: list[str]
    modules: dict[str, ModuleRow]
    matrices: list[FactorsRow]
    whole: list[str]
    unchanged: list[str]
    not_carried: list[NotCarried]
    totals: AdapterTotals
    grown: dict[str, int]
    tied: list[str]
    budget: BudgetReport | None
    one_sided: list[OneSidedBlocks]


class MergeLoss(TypedDict):
    """How much of an update rounding lost, and the share of elements that it left as they were."""

    relative_loss: float | None
    unchanged_fraction: float


class MergedSums(TypedDict):
    """One changed matrix or vector: its key, the dtype it is stored in, and the sums of its Loss."""

    tensor: str
    part: str
    role: str
    depth: int | None
    expert: int | None
    stack: str
    shape: list[int]
    dtype: str
    update: float
    error: float
    unchanged: int
    elements: int


class MergedRow(MergedSums, MergeLoss):
    """One changed matrix or vector, with what its sums say."""


class MergeIdentity(TypedDict):
    """What was merged into what, and in which dtype it is stored."""

    kind: str
    base: SourceIdentity
    adapters: list[WeightedSource]
    dtype: str
    deltaspec: str
    map: NotRequired[list[str]]
    component: NotRequired[str]


class MergedReport(MergeIdentity):
    """``deltaspec.json`` of a merged checkpoint."""

    total: MergeLoss
    remark: str
    notes: list[str]
    matrices: list[MergedRow]
