"""Adapters → one adapter: their sum, recompressed exactly through QR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.engine.local import resolve_devices
from deltaspec.errors import PairingError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import identify_source, open_source
from deltaspec.io.staging import Staging
from deltaspec.options import ExtractOptions
from deltaspec.pairing.plan import Plan
from deltaspec.pairing.sums import Total, sum_adapters
from deltaspec.store.pieces import Pieces
from deltaspec.types import AdapterIndex, Checkpoint, TensorSpec
from deltaspec.workflows.analyze import Step
from deltaspec.workflows.assemble import Assembly, write_adapters
from deltaspec.workflows.extract import Runner, label_amounts, make_jobs
from deltaspec.workflows.rest import Leftover, Rest
from deltaspec.workflows.sources import Sources, resolve_dtype
from deltaspec.workflows.spend import spend

Weighted = tuple[str | Path, float]


def combine(
    adapters: Sequence[Weighted],
    out: str | Path,
    *,
    options: ExtractOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Write Σ weight·scaling·B·A of one or more adapters as one adapter.

    Parameters
    ----------
    adapters : sequence of (path, weight)
        LoRA folders, or files in kohya's naming, of one base; one alone is resized.
    out : str or Path
        The new adapter's folder, written whole or not at all.
    options : ExtractOptions, optional
        Ranks and form; a rank as large as the sum of the ranks loses nothing.
    overwrite : bool
        Replace an adapter that is there.
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    dict
        Label → the report that is also written as ``deltaspec.json``.

    Raises
    ------
    DeltaspecError
        If an adapter cannot be read, two have different shapes, or tensors stored whole do not add up.
    """
    options = options or ExtractOptions()
    devices = resolve_devices(options.analysis.device, options.analysis.workers)
    indexes = [_open(path) for path, _ in adapters]
    total = sum_adapters(indexes, [weight for _, weight in adapters])
    made = [{"weight": weight, **identify_source(i)} for i, (_, weight) in zip(indexes, adapters, strict=True)]
    base = _base_of(indexes[0], total)
    sources = Sources(
        base, indexes[0], Plan(notes=total.notes), total.modules, {}, resolve_dtype(options.form.dtype, total.modules)
    )
    options = replace(options, form=replace(options.form, extras="all" if options.form.target == "peft" else "none"))
    identity = {"base": {"ref": base.ref}, "adapters": made, "options": options.identity()}
    inputs = [index.root for index in indexes]
    with Staging(Path(out), identity=identity, overwrite=overwrite, inputs=inputs) as staging:
        runner = Runner(options, devices, progress)
        spending = spend(sources, options, runner, Pieces(staging.path / "spectra"))
        pieces = Pieces(staging.path / "factors")
        rows = runner.fill(make_jobs(sources, options, spending, None), pieces)
        if not any(row["energy"] for row in rows.values()) and not total.biases and not total.full:
            message = f"The sum of {', '.join(index.ref for index in indexes)} is zero: there is nothing to write."
            raise PairingError(message)
        loader = {name: indexes[0].config.get(name) for name in ("task_type", "auto_mapping")}
        assembly = Assembly(sources, options, rows, pieces, _rest(total, rows), spending, identity, loader)
        reports = write_adapters(assembly, staging.path / "built", labels=label_amounts(options.ranks))
        staging.commit(staging.path / "built")
    return reports


def _base_of(index: AdapterIndex, total: Total) -> Checkpoint:
    """Stand in for the base, of which only names are needed: those of the adapter's modules."""
    tensors = {m.name: TensorSpec(m.name, index.root, m.shape, "F32") for m in total.modules}
    tensors |= {name: replace(spec, name=name) for name, spec in total.full.items()}
    path = Path(index.base_model).expanduser()
    root = path if index.base_model and path.is_dir() else index.root
    return Checkpoint(index.base_model, root, (), tensors, revision=index.config.get("revision"))


def _rest(total: Total, rows: dict[str, Any]) -> Rest:
    """Biases and tensors stored whole go along."""
    rest = Rest()
    for path, terms in total.biases.items():
        rest.biases[f"{path}.bias"] = partial(_sum, terms)
        energy = float(_sum(terms).square().sum())
        rest.leftovers.append(Leftover(f"{path}.bias", "bias", "this target carries no biases", energy))
    for name, spec in total.full.items():
        rest.leftovers.append(Leftover(name, "other", "this target carries no whole tensors", None, spec))
    rest.unchanged = [m.name for m in total.modules if not any(rows[str(p.key)]["energy"] for p in m.pairs)]
    return rest


def _sum(terms: list[tuple[TensorSpec, float]]) -> Tensor:
    return torch.stack([read_tensor(spec).double() * factor for spec, factor in terms]).sum(0)


def _open(path: str | Path) -> AdapterIndex:
    index = open_source(path)
    if not isinstance(index, AdapterIndex):
        message = f"{index.ref} is a full checkpoint: combine and resize take LoRA adapters; extract one first."
        raise PairingError(message)
    return index
