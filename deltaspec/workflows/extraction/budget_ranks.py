"""A budget over all matrices: their spectra, from a run or computed first, then the ranks that it buys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltaspec.delta import DenseDelta, energy_of
from deltaspec.errors import NumericalError, RunError
from deltaspec.extraction.budget import Unit, allocate_ranks, uniform_rank
from deltaspec.files.dtypes import OPTIONS
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.matrix import read_low_rank
from deltaspec.io.peft_layout import Layout, lay_out
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.linalg.svd import decompose
from deltaspec.options import BUDGETS, ExtractOptions, RankOptions
from deltaspec.store.formats.adapter import BudgetReport
from deltaspec.store.formats.piece import SpectrumRow
from deltaspec.store.pieces import Pieces
from deltaspec.store.run import Run
from deltaspec.types import LowRankSource, MatrixSource, ModulePair
from deltaspec.workflows.extraction.factorise_matrix import Job
from deltaspec.workflows.extraction.fill_pieces import fill_pieces
from deltaspec.workflows.extraction.nouns import Sources, Spending
from deltaspec.workflows.shared.non_finite import locate
from deltaspec.workflows.shared.workers import Workers


@dataclass(frozen=True, slots=True)
class Known:
    """All singular values of one ΔW, (k,) float64, and ‖W‖²."""

    values: NDArray[np.float64]
    base_energy: float


def spend(sources: Sources, options: ExtractOptions, workers: Workers, pieces: Pieces) -> Spending | None:
    """Allocate ranks under each budget; None where the policy is none.

    Raises
    ------
    RunError
        If the run compares other files.
    OptionError
        If a budget buys nothing.
    """
    if options.ranks.policy not in BUDGETS:
        return None
    known = _from_run(sources, options.run) if options.run else {}
    pairs = [pair for module in sources.modules for pair in module.pairs]
    jobs = [Job(pair, {}, given=True, dtype=sources.dtype) for pair in pairs if str(pair.key) not in known]
    rows = fill_pieces(jobs, pieces, _spectrum, workers)
    for job in jobs:
        values = pieces.tensors(job.key)["values"].numpy()
        known[job.key] = Known(values, rows[job.key]["base_energy"])
    return _allocate(sources, options, known)


def _spectrum(job: Job, device: torch.device) -> tuple[SpectrumRow, dict[str, Tensor]]:
    """All singular values of one pair's ΔW."""
    pair = job.pair
    if isinstance(pair.tuned, LowRankSource):
        factors = read_low_rank(pair.tuned)
        values = svd_of_product(factors.lora_B.to(device), factors.lora_A.to(device))[1].cpu()
        base = energy_of(pair.base, device=device) if isinstance(pair.base, MatrixSource) else 0.0
        return {"base_energy": base}, {"values": values}
    assert isinstance(pair.base, MatrixSource)
    delta = DenseDelta(pair.base, pair.tuned, device=device)
    try:
        spectrum, _ = decompose(delta.blocks, pair.shape, device=device)
    except NumericalError as cause:
        raise locate(pair, job.key, cause) from cause
    return {"base_energy": delta.base_energy}, {"values": spectrum.singular_values}


def _from_run(sources: Sources, path: str) -> dict[str, Known]:
    """Take what a run knows, after checking that it compares the same files."""
    run = Run.load(path)
    known = (("base", run.manifest["base"], sources.base), ("tuned", run.manifest["tuned"], sources.tuned))
    for side, analysed, source in known:
        if analysed["files"] != fingerprint(source):
            message = (
                f"{run.path} analysed another {side} ({analysed['ref']}, not {source.ref}): analyse these "
                "two, or leave --run out."
            )
            raise RunError(message)
    shapes = {str(pair.key): pair.shape for module in sources.modules for pair in module.pairs}
    return {
        record.store_key: Known(
            run.spectrum(record.store_key).singular_values.numpy(), float(record.metrics["base_norm"] or 0.0) ** 2
        )
        for record in run.records
        if record.spectrum_of == "delta" and shapes.get(record.store_key) == record.shape
    }


def _allocate(sources: Sources, options: ExtractOptions, known: dict[str, Known]) -> Spending:
    """Spend each budget over the matrices, those that share a rank together."""
    groups = _groups(sources.modules, lay_out(sources.base, sources.heads))
    units = [_unit(keys, cost, known, weighted=options.ranks.weighted) for keys, cost in groups]
    ranks: defaultdict[str, dict[str, int]] = defaultdict(dict)
    report: dict[str, BudgetReport] = {}
    buy = _buy if options.form.target == "peft" else _buy_uniform
    for label, amount in options.ranks.labels().items():
        budget = int(amount)
        if options.ranks.policy == "size":
            budget = max(0, int((amount - _header(sources.modules)) // OPTIONS[sources.dtype].width))
        found, report[label] = buy(units, budget, options.ranks)
        for (keys, _), rank in zip(groups, found, strict=True):
            for key in keys:
                ranks[key][label] = int(rank)
    return Spending(dict(ranks), report)


def _buy(units: Sequence[Unit], budget: int, ranks: RankOptions) -> tuple[Sequence[int], BudgetReport]:
    """Buy each unit a rank of its own."""
    found = allocate_ranks(units, budget, min_rank=ranks.minimum, max_rank=ranks.maximum or None)
    bound = found.loss_bound / found.total if found.total else 0.0
    return found.ranks, {"budget": budget, "spent": found.spent, "uniform": None, "loss_bound": bound}


def _buy_uniform(units: Sequence[Unit], budget: int, ranks: RankOptions) -> tuple[Sequence[int], BudgetReport]:
    """Buy one rank for all, as targets want it that know no other."""
    one = uniform_rank(units, budget, min_rank=ranks.minimum, max_rank=ranks.maximum or None)
    spent = one * sum(unit.cost for unit in units if unit.energies.any())
    report: BudgetReport = {"budget": budget, "spent": spent, "uniform": one, "loss_bound": None}
    return [min(one, unit.energies.size) for unit in units], report


def _groups(modules: Sequence[ModulePair], layout: Layout) -> list[tuple[list[str], int]]:
    """Matrices that are stored at one rank, and what one more direction of it costs in the file.

    Experts share their stack's rank, also where the base holds them one by one; factors of an embedding are written
    for every module that is tied to it.
    """
    groups: dict[object, tuple[list[str], int]] = {}
    for module in modules:
        keys, (d_out, d_in) = [str(pair.key) for pair in module.pairs], module.shape
        places = layout.place(module.path)
        if places[0].expert is not None:
            place = places[0]
            known, cost = groups.get((place.name, place.part), ([], 0))
            groups[place.name, place.part] = (known + keys, cost + place.parts * d_out + d_in)
        elif module.kind == "stack":
            groups[module.name] = (keys, len(keys) * (d_out + d_in))
        else:
            cost = _copies(module, layout) * (d_out + d_in) if len(places) == 1 else d_out + len(places) * d_in
            groups |= {key: ([key], cost) for key in keys}
    return list(groups.values())


def _header(modules: Sequence[ModulePair]) -> int:
    """Bytes of the file's header, at most: two tensors for each module, with their names, shapes and offsets."""
    return 64 + sum(2 * (len(module.path) + 128) for module in modules)


def _copies(module: ModulePair, layout: Layout) -> int:
    """How often a module's factors are written."""
    if module.kind != "embedding":
        return 1
    return len(layout.holders(layout.place(module.path)[0].name.removesuffix(".weight")))


def _unit(keys: list[str], cost: int, known: dict[str, Known], *, weighted: bool) -> Unit:
    energies = np.zeros(max(known[key].values.size for key in keys))
    for key in keys:
        energies[: known[key].values.size] += known[key].values ** 2
    base = sum(known[key].base_energy for key in keys)
    return Unit(energies, cost, weight=1 / base if weighted and base else 1.0)
