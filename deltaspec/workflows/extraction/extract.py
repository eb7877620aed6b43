"""Two checkpoints → a LoRA adapter of the change, with a certificate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from deltaspec.engine.local import resolve_devices
from deltaspec.errors import PairingError
from deltaspec.io.fingerprint import identify_source
from deltaspec.io.moments import Moments, open_moments
from deltaspec.io.staging import Staging
from deltaspec.options import ExtractOptions
from deltaspec.store.formats.adapter import AdapterReport, ExtractionIdentity
from deltaspec.types import Step
from deltaspec.workflows.extraction.build_adapters import build_adapters
from deltaspec.workflows.extraction.leftovers import measure_rest
from deltaspec.workflows.extraction.nouns import Extraction, Finished, Rest, Sources
from deltaspec.workflows.extraction.sources import open_sources
from deltaspec.workflows.shared.workers import Workers


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    options: ExtractOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> dict[str, AdapterReport]:
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
    extraction = _open(base, tuned, options)

    def measure(rows: Finished) -> Rest:
        rest = measure_rest(extraction.sources, rows, device=devices[0])
        _refuse_equal(extraction, rows, rest)
        return rest

    inputs = [extraction.sources.base.root, extraction.sources.tuned.root]
    with Staging(Path(out), identity=dict(extraction.identity), overwrite=overwrite, inputs=inputs) as staging:
        return build_adapters(extraction, Workers(devices, options.analysis.memory, progress), staging, measure)


def _open(base: str | Path, tuned: str | Path, options: ExtractOptions) -> Extraction:
    """Open both sides, and the second moments where there are any."""
    sources = open_sources(base, tuned, options)
    moments = open_moments(Path(options.calibration)) if options.calibration else None
    first, second = identify_source(sources.base), identify_source(sources.tuned)
    identity: ExtractionIdentity = {
        "base": first,
        "tuned": second,
        "options": {**options.identity(), "calibration": _digest(options.calibration)},
        "deltaspec": version("deltaspec"),
    }
    if moments:
        _check_moments(moments, sources, [first["files"], second["files"]])
    return Extraction(sources, options, identity, moments)


def _check_moments(moments: Moments, sources: Sources, models: Sequence[dict[str, str]]) -> None:
    """Refuse second moments of other layers, and note those of another model than these, by their files."""
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
    if measured.get("files") not in models:
        note = f"the inputs were measured on {measured.get('ref')}, neither the base nor the tuned model"
        sources.plan.note(note)


def _refuse_equal(extraction: Extraction, rows: Finished, rest: Rest) -> None:
    sources = extraction.sources
    others = [item.name for item in rest.leftovers if item.energy or item.whole]
    if any(row["energy"] for row in rows.values()) or (others and extraction.options.form.extras != "none"):
        return
    advice = f"what changed is '{others[0]}' and {len(others) - 1} more: pass --extras all" if others else ""
    message = (
        f"No matrix that could get factors differs between {sources.base.ref} and {sources.tuned.ref}: "
        f"{advice or 'there is nothing to extract; check that the second is the fine-tune'}."
    )
    raise PairingError(message)


def default_folder(tuned: str | Path, options: ExtractOptions) -> Path:
    """Name an adapter's folder after the tuned model and the policy.

    Examples
    --------
    >>> default_folder("owner/name@main", ExtractOptions()).as_posix()
    'adapters/name-rank-16'
    """
    name = str(tuned).rstrip("/").split("/")[-1].split("@")[0] or "model"
    labels = options.ranks.labels()
    return Path("adapters") / f"{name}-{next(iter(labels)) if len(labels) == 1 else options.ranks.policy + 's'}"


def _digest(path: str) -> str:
    if not path:
        return ""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
