"""One matrix of a running model from an attached method's update to its record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaspec.architecture.views import view_matrix
from deltaspec.errors import NumericalError, PairingError
from deltaspec.files.dtypes import name_of
from deltaspec.linalg.svd import decompose
from deltaspec.options import AnalyzeOptions
from deltaspec.spectra.evidence import Evidence
from deltaspec.training.methods.base_weights.own import BaseAttachment
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import base_matrix, list_sites, module_at
from deltaspec.training.sites.site import Site
from deltaspec.types import LowRankDelta, MatrixKey, MatrixRecord, Spectrum
from deltaspec.workflows.analysis.stored_matrix import Decomposed, decompose_factors, make_record
from deltaspec.workflows.shared.fill_run import work_of


@dataclass(frozen=True, slots=True)
class LiveTask:
    """One decomposition: ``site`` is where an update acts, ``piece`` the site itself or a part of its fused matrix."""

    site: Site
    piece: Site
    key: MatrixKey
    spectrum_of: str

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.piece.shape

    @property
    def store_key(self) -> str:
        """The name of its record in the run; see MatrixRecord.store_key."""
        return str(self.key) if self.spectrum_of == "delta" else f"{self.key}#{self.spectrum_of}"

    @property
    def work(self) -> int:
        """Multiply-adds up to a constant."""
        return work_of(self.shape)


@torch.no_grad()
def analyze_site(
    task: LiveTask, device: torch.device, *, attachment: Attachment, options: AnalyzeOptions, norms: Mapping[str, float]
) -> tuple[MatrixRecord, Spectrum]:
    """Decompose one matrix of a running model and measure it.

    Raises
    ------
    NumericalError
        If it holds NaN or infinity (naming the site), or does not converge.
    PairingError
        If the method does not change this matrix.
    """
    start, piece = time.perf_counter(), task.piece
    base, delta = base_weight(attachment, piece), delta_of(attachment, task)
    norm = norms.get(str(task.key)) or norm_of(base)
    note, own = "", isinstance(attachment, BaseAttachment)
    try:
        if task.spectrum_of == "delta" and isinstance(delta, LowRankDelta):
            spectrum = decompose_factors(delta, device=device, vectors=options.vectors)
        else:
            dense = _dense(base, delta, task.spectrum_of).to(device).contiguous()
            spectrum, note = decompose(
                lambda: [dense],
                task.shape,
                device=device,
                vectors=options.vectors,
                exact=options.exact or base.dtype == torch.float64,
            )
    except NumericalError as cause:
        message = f"The {task.spectrum_of} of '{piece.name}' cannot be decomposed ({cause}): did training diverge?"
        raise NumericalError(message) from cause
    if task.spectrum_of == "delta":
        evidence = Evidence(spectrum, base_norm=norm, unrounded=not own)
    else:
        evidence = Evidence(spectrum)
    dtypes = name_of(base.dtype), name_of(base.dtype if own else next(iter(attachment.state().values())).dtype)
    found = Decomposed(evidence, spectrum, dtypes, (note,) if note else ())
    return make_record(task, found, device=device, start=start), spectrum


def _dense(base: Tensor, delta: LowRankDelta | Tensor, spectrum_of: str) -> Tensor:
    """Return the matrix that is decomposed, (d_out, d_in), float64."""
    if spectrum_of == "base":
        return base.double()
    change = delta.lora_B @ delta.lora_A if isinstance(delta, LowRankDelta) else delta
    return change if spectrum_of == "delta" else base.double() + change


def delta_of(attachment: Attachment, task: LiveTask) -> LowRankDelta | Tensor:
    """Return ΔW of the rows that a task means."""
    delta = attachment.delta(task.site)
    if delta is None:
        message = f"'{task.site.name}' has an update that is none of weights: there is no ΔW to decompose."
        raise PairingError(message)
    if task.piece is task.site:
        return delta
    rows = replace(task.piece.view, transposed=False)  # a delta lies (d_out, d_in) already
    if isinstance(delta, LowRankDelta):
        rank = delta.lora_A.shape[0]
        return LowRankDelta(delta.lora_A, view_matrix(delta.lora_B, replace(rows, shape=(rows.shape[0], rank))))
    return view_matrix(delta, rows)


def base_weight(attachment: Attachment, piece: Site) -> Tensor:
    """Return the base's matrix (d_out, d_in), as it was before training."""
    if isinstance(attachment, BaseAttachment):
        return view_matrix(attachment.base.original(piece.key.tensor), piece.view)
    return base_matrix(module_at(attachment.model, piece.path), piece)


def norm_of(weight: Tensor) -> float:
    """Return ‖W‖, accumulated in float64.

    Raises
    ------
    NumericalError
        If it is not finite.
    """
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    if not math.isfinite(norm):
        message = "A weight of the base holds NaN or infinity: repair the base."
        raise NumericalError(message)
    return norm


def list_pieces(attachment: Attachment, names: Mapping[str, str]) -> Iterator[tuple[Site, Site, MatrixKey]]:
    """Yield each site with itself, or with each part of its fused matrix, and the key that the part's record gets."""
    parts: dict[str, list[Site]] = {}
    for part in list_sites(attachment.model, split=True):
        parts.setdefault(part.path, []).append(part)
    for site in attachment.sites:
        fused = site.whole and len(parts[site.path]) > 1
        for piece in parts[site.path] if fused else [site]:
            yield site, piece, replace(piece.key, tensor=names.get(piece.key.tensor, piece.key.tensor))
