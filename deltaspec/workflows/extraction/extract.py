"""Two checkpoints → a LoRA adapter of the change, with a certificate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaspec.engine.local import resolve_devices
from deltaspec.errors import PairingError
from deltaspec.io.moments import Moments, open_moments
from deltaspec.io.open import identify_source
from deltaspec.io.staging import Staging
from deltaspec.options import ExtractOptions
from deltaspec.store.pieces import Pieces
from deltaspec.types import Step
from deltaspec.workflows.extraction.adapter_folder import write_adapters
from deltaspec.workflows.extraction.budget_ranks import spend
from deltaspec.workflows.extraction.factorise_matrix import Job
from deltaspec.workflows.extraction.leftovers import measure_rest
from deltaspec.workflows.extraction.nouns import Assembly, Rest, Sources, Spending
from deltaspec.workflows.extraction.runner import Runner
from deltaspec.workflows.extraction.sources import open_sources


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    options: ExtractOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Write the change between two checkpoints as low-rank factors that PEFT loads, and say how good they are.

    Parameters
    ----------
    base, tuned : str or Path
        A folder, a file, or a hub id with @revision; tuned may be a LoRA adapter of base.
    out : str or Path
        The adapter's folder, written whole or not at all. With several amounts it holds one folder for each.
    options : ExtractOptions, optional
    overwrite : bool
        Replace an adapter that is there.
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    dict
        Label (rank-16, energy-0.9, …) → the report that is also written as ``deltaspec.json``.

    Raises
    ------
    DeltaspecError
        If a side cannot be read, the two do not pair, a matrix holds NaN, or ``out`` cannot be written.
    """
    options = options or ExtractOptions()
    devices = resolve_devices(options.analysis.device, options.analysis.workers)
    sources = open_sources(base, tuned, options)
    moments = open_moments(Path(options.calibration)) if options.calibration else None
    identity = {
        "base": identify_source(sources.base),
        "tuned": identify_source(sources.tuned),
        "options": {**options.identity(), "calibration": _digest(options.calibration)},
        "deltaspec": version("deltaspec"),
    }
    if moments:
        _check_moments(moments, sources, identity)

    def measure(rows: dict[str, Any]) -> Rest:
        rest = measure_rest(sources, rows, device=devices[0])
        _refuse_equal(sources, options, rows, rest)
        return rest

    inputs = [sources.base.root, sources.tuned.root]
    with Staging(Path(out), identity=identity, overwrite=overwrite, inputs=inputs) as staging:
        runner = Runner(options, devices, progress)
        return build(sources, runner, staging, identity=identity, measure=measure, moments=moments)


def build(
    sources: Sources,
    runner: Runner,
    staging: Staging,
    *,
    identity: dict[str, Any],
    measure: Callable[[dict[str, Any]], Rest],
    moments: Moments | None = None,
    loader: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Factorise every matrix that is not done yet, write the adapters and commit them; returns their reports.

    Parameters
    ----------
    sources : Sources
    runner : Runner
    staging : Staging
        Entered; it keeps what is finished.
    identity : dict
        What the adapters are made from, for their reports.
    measure : callable
        Finished rows → what goes beside the factors; it refuses where there is nothing to write.
    moments : Moments, optional
        Second moments of the layers' inputs.
    loader : dict, optional
        What says which class loads the adapters, where the base's config cannot.
    """
    options = runner.options
    spending = spend(sources, options, runner, Pieces(staging.path / "spectra"))
    pieces = Pieces(staging.path / "factors")
    rows = runner.fill(make_jobs(sources, options, spending, moments), pieces)
    assembly = Assembly(sources, options, rows, pieces, measure(rows), spending, identity, loader)
    reports = write_adapters(assembly, staging.path / "built", labels=options.ranks.labels())
    staging.commit(staging.path / "built")
    return reports


def _check_moments(moments: Moments, sources: Sources, identity: dict[str, Any]) -> None:
    """Refuse second moments of other layers, and note those of another model."""
    if not {module.name for module in sources.modules} & set(moments.names):
        message = (
            f"'{moments.path}' has moments of none of the matrices to extract: calibrate {sources.base.ref} itself."
        )
        raise PairingError(message)
    tokens = moments.about["tokens"]
    few = [m.name for m in sources.modules if m.name in moments.names and tokens < m.shape[1]]
    if few:
        note = f"{len(few)} layers are wider than the {tokens} tokens of the calibration: calibrate on more text"
        sources.plan.note(note)
    measured = moments.about["model"]
    if measured.get("files") not in (identity["base"]["files"], identity["tuned"]["files"]):
        note = f"the inputs were measured on {measured.get('ref')}, neither the base nor the tuned model"
        sources.plan.note(note)


def _refuse_equal(sources: Sources, options: ExtractOptions, rows: dict[str, Any], rest: Rest) -> None:
    others = [item.name for item in rest.leftovers if item.energy or item.whole]
    if any(row["energy"] for row in rows.values()) or (others and options.form.extras != "none"):
        return
    advice = f"what changed is '{others[0]}' and {len(others) - 1} more: pass --extras all" if others else ""
    message = (
        f"No matrix that could get factors differs between {sources.base.ref} and {sources.tuned.ref}: "
        f"{advice or 'there is nothing to extract; check that the second is the fine-tune'}."
    )
    raise PairingError(message)


def default_folder(tuned: str | Path, options: ExtractOptions) -> Path:
    """Name an adapter's folder after the tuned model and the policy."""
    name = str(tuned).rstrip("/").split("/")[-1].split("@")[0] or "model"
    labels = options.ranks.labels()
    return Path("adapters") / f"{name}-{next(iter(labels)) if len(labels) == 1 else options.ranks.policy + 's'}"


def make_jobs(
    sources: Sources, options: ExtractOptions, spending: Spending | None, moments: Moments | None
) -> list[Job]:
    """One job for each matrix that gets factors."""
    amounts, jobs = options.ranks.labels(), []
    for module in sources.modules:
        for pair in module.pairs:
            labels = spending.ranks[str(pair.key)] if spending else amounts
            weigh = partial(moments.get, module.name) if moments and module.kind in ("linear", "conv1d") else None
            jobs.append(Job(pair, labels, spending is not None, sources.dtype, weigh))
    return jobs


def _digest(path: str) -> str:
    if not path:
        return ""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
