"""One matrix from its stored pair to its record: what the engine runs for each item of the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from deltaspec.delta import DenseDelta, energy_of, stream
from deltaspec.errors import NumericalError
from deltaspec.files.dtypes import DTYPES
from deltaspec.io.matrix import read_low_rank
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.svd import CERTIFICATE, EPS, decompose
from deltaspec.options import AnalyzeOptions
from deltaspec.spectra.evidence import Evidence
from deltaspec.spectra.metrics import measure
from deltaspec.types import LowRankDelta, LowRankSource, MatrixKey, MatrixRecord, MatrixSource, Spectrum, WeightPair
from deltaspec.workflows.shared.fill_run import Item, work_of
from deltaspec.workflows.shared.non_finite import locate


@dataclass(frozen=True, slots=True)
class Task:
    """One decomposition: a pair, and which of delta, base and tuned."""

    pair: WeightPair
    spectrum_of: str

    @property
    def key(self) -> MatrixKey:
        """The pair's."""
        return self.pair.key

    @property
    def shape(self) -> tuple[int, int]:
        """The pair's."""
        return self.pair.shape

    @property
    def store_key(self) -> str:
        """The name of its record in the run; see MatrixRecord.store_key."""
        return str(self.pair.key) if self.spectrum_of == "delta" else f"{self.pair.key}#{self.spectrum_of}"

    @property
    def work(self) -> int:
        """Multiply-adds up to a constant."""
        return work_of(self.pair.shape)


def memory_of(task: Task, options: AnalyzeOptions) -> int:
    """Bytes that a task needs while in flight, measured on each route's largest phase."""
    side, long = min(task.pair.shape), max(task.pair.shape)
    square = 8 * side * side
    sources = [source for source in (task.pair.base, task.pair.tuned) if isinstance(source, MatrixSource)]
    mapped = sum(DTYPES[source.spec.dtype].width * side * long for source in sources)
    if len(sources) < 2:
        return mapped + 24 * (side + long) * 1024
    gram = square + mapped + (16 << 20)
    if options.exact:
        return gram + 8 * side * min(long, 6 * side)
    if options.vectors:
        return max(gram, 5 * square) + 8 * long * options.vectors
    return max(gram, 2 * square)


def analyze_matrix(
    task: Task, device: torch.device, *, options: AnalyzeOptions, norms: Mapping[str, float] | None = None
) -> tuple[MatrixRecord, Spectrum]:
    """Decompose one matrix and measure it.

    Parameters
    ----------
    task : Task
    device : torch.device
    options : AnalyzeOptions
    norms : mapping of str to float, optional
        Norms of the base's matrices, by key, that are known already.

    Raises
    ------
    NumericalError
        If it holds NaN or infinity (naming tensor and index), or does not converge.
    CheckpointError
        If it cannot be read.
    """
    start = time.perf_counter()
    pair, notes = task.pair, []
    try:
        if task.spectrum_of != "delta":
            evidence, spectrum, note = _of_one(task, options, device)
        elif isinstance(pair.tuned, LowRankSource):
            evidence, spectrum, note = _of_factors(pair, options, device, norms or {})
        else:
            evidence, spectrum, note = _of_delta(pair, options, device)
    except NumericalError as cause:
        raise locate(pair, task.store_key, cause) from cause
    if note:
        notes.append(note)
    if evidence.rounding and evidence.rounding.grid != _dtype(pair.tuned):
        grid = evidence.rounding.grid
        notes.append(f"tuned values are {grid} saved as {_dtype(pair.tuned)}: rounding is that of {grid}")
    dtypes = _dtype(pair.base), _dtype(pair.tuned)
    return make_record(task, Decomposed(evidence, spectrum, dtypes, tuple(notes)), device=device, start=start), spectrum


@dataclass(frozen=True, slots=True)
class Decomposed:
    """What was computed of one matrix; ``dtypes`` are base's and tuned's, as stored."""

    evidence: Evidence
    spectrum: Spectrum
    dtypes: tuple[str, str]
    notes: tuple[str, ...] = ()


def make_record(task: Item, found: Decomposed, *, device: torch.device, start: float) -> MatrixRecord:
    """Measure what was found of a task's matrix.

    Parameters
    ----------
    task : Item
    found : Decomposed
    device : torch.device
        Where it was computed.
    start : float
        Of ``time.perf_counter`` when the work began.
    """
    spectrum = found.spectrum
    return MatrixRecord(
        key=task.key,
        shape=spectrum.shape,
        base_dtype=found.dtypes[0],
        tuned_dtype=found.dtypes[1],
        spectrum_of=task.spectrum_of,
        metrics=measure(found.evidence),
        method=spectrum.method,
        error_bound=spectrum.error_bound,
        seconds=time.perf_counter() - start,
        device=str(device),
        notes=found.notes,
    )


def _dtype(source: MatrixSource | LowRankSource) -> str:
    if isinstance(source, MatrixSource):
        return source.spec.dtype
    return source.terms[0].lora_A.dtype if source.terms else ""


def _of_delta(pair: WeightPair, options: AnalyzeOptions, device: torch.device) -> tuple[Evidence, Spectrum, str]:
    assert isinstance(pair.base, MatrixSource)
    assert isinstance(pair.tuned, MatrixSource)
    delta = DenseDelta(pair.base, pair.tuned, device=device)
    exact = options.exact or "F64" in (
        pair.base.spec.dtype,
        pair.tuned.spec.dtype,
    )  # fp64 files hold more than a Gram keeps
    spectrum, note = decompose(delta.blocks, pair.shape, device=device, vectors=options.vectors, exact=exact)
    evidence = Evidence(spectrum, base_norm=math.sqrt(delta.base_energy), rounding=delta.rounding)
    return evidence, spectrum, note


def _of_one(task: Task, options: AnalyzeOptions, device: torch.device) -> tuple[Evidence, Spectrum, str]:
    """Decompose W_base or W_tuned itself."""
    source = task.pair.base if task.spectrum_of == "base" else task.pair.tuned
    assert isinstance(source, MatrixSource)  # factors get no such task
    exact = options.exact or source.spec.dtype == "F64"
    blocks = partial(stream, source, device=device)
    spectrum, note = decompose(blocks, task.pair.shape, device=device, vectors=options.vectors, exact=exact)
    return Evidence(spectrum), spectrum, note


def _of_factors(
    pair: WeightPair, options: AnalyzeOptions, device: torch.device, norms: Mapping[str, float]
) -> tuple[Evidence, Spectrum, str]:
    """Decompose stored factors through QR, never formed densely."""
    assert isinstance(pair.tuned, LowRankSource)
    spectrum = decompose_factors(read_low_rank(pair.tuned), vectors=options.vectors, device=device)
    base_norm = norms.get(str(pair.key))
    if base_norm is None:
        base_norm = _norm_of(pair.base, device)
    return Evidence(spectrum, base_norm=base_norm, unrounded=True), spectrum, ""


def _norm_of(source: MatrixSource | LowRankSource, device: torch.device) -> float | None:
    """Return ‖·‖ of a base, or of the first of two adapters; None where that one has no factors here."""
    if isinstance(source, MatrixSource):
        norm = math.sqrt(energy_of(source, device=device))
    elif source.terms:
        norm = math.sqrt(decompose_factors(read_low_rank(source), device=device).energy)
    else:
        return None
    if not math.isfinite(norm):
        message = "the base holds NaN or infinity."
        raise NumericalError(message)
    return norm


def decompose_factors(delta: LowRankDelta, *, device: torch.device, vectors: int = 0) -> Spectrum:
    """Decompose ΔW = B·A through QR.

    Parameters
    ----------
    delta : LowRankDelta
    device : torch.device
    vectors : int
        How many top triplets to keep; fewer where values drown in the error bound.

    Raises
    ------
    NumericalError
        If a factor holds NaN or infinity, or the certificate Σσ² = ‖ΔW‖² is missed.
    """
    lora_A, lora_B = delta.lora_A.to(device), delta.lora_B.to(device)
    shape = (lora_B.shape[0], lora_A.shape[1])
    scale = float(lora_A.norm() * lora_B.norm())
    if not math.isfinite(scale):
        message = "its factors hold NaN or infinity."
        raise NumericalError(message)
    left, values, right = (t.cpu() for t in svd_of_product(lora_B, lora_A))
    energy = float(((lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)).sum())
    if not abs(float(values.square().sum()) - energy) <= CERTIFICATE * scale**2:
        message = "the decomposition of its factors missed the certificate Σσ² = ‖·‖²."
        raise NumericalError(message)
    bound = sum(shape) * EPS * scale
    if not values.numel() or float(values[0]) <= bound:  # factors that cancel, an adapter against itself
        return Spectrum(torch.zeros_like(values), shape, 0.0, "zero", bound)
    kept = min(vectors, int((values > bound).sum()))
    vector_pair = (left[:, :kept], right[:, :kept]) if vectors else (None, None)
    return Spectrum(values, shape, float(values.square().sum()), "qr-of-factors", bound, *vector_pair)
