"""A base and adapters → a merged checkpoint, streamed tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError, OptionError, PairingError
from deltaspec.files.atomic import whole_file
from deltaspec.io.fingerprint import identify_source
from deltaspec.io.foreign_marks import describe_module
from deltaspec.io.meta_layout import CONVERT
from deltaspec.io.open import open_plain
from deltaspec.io.staging import Staging
from deltaspec.options import MergeOptions
from deltaspec.pairing.renamed import choose_names
from deltaspec.store.formats.adapter import MergeIdentity
from deltaspec.types import AdapterIndex, Checkpoint, Step
from deltaspec.workflows.merging.checkpoint_writer import Files, Rewrite, assign_files, write_beside, write_files
from deltaspec.workflows.merging.collect_changes import collect_changes
from deltaspec.workflows.merging.report import MergeReport

Given = str | Path | tuple[str | Path, float]
Addend = tuple[AdapterIndex, float]


def merge(
    base: str | Path,
    adapters: Sequence[Given],
    out: str | Path,
    *,
    options: MergeOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> MergeReport:
    """Write base + Σ weight·ΔW: each tensor summed in float32 (float64 where it is stored so) and rounded once.

    Parameters
    ----------
    base : str or Path
        A folder, a file, or a hub id with @revision; it may be larger than memory.
    adapters : sequence
        LoRA adapters, each a path, ``path:weight``, or a tuple of both.
    out : str or Path
        The merged checkpoint's folder, or a name in .safetensors where the base is one file; written whole or not at
        all. A merge that was killed goes on where it stopped.
    options : MergeOptions, optional
    overwrite : bool
        Replace a checkpoint that is there.
    progress : callable, optional
        Called with a Step after each tensor.

    Raises
    ------
    DeltaspecError
        If a side cannot be read, an adapter belongs to another base, or ``out`` cannot be written.
    """
    options = options or MergeOptions()
    source, given = _open(base, adapters, options)
    rewrite = Rewrite(source, collect_changes(source, given), options.dtype)
    facts, files = _describe(source, given, options), assign_files(rewrite, Path(out))
    inputs = _list_files(source, given)
    with Staging(out, identity=_identity(facts), overwrite=overwrite, inputs=inputs) as staging:
        rows = write_files(rewrite, files, staging.path / "built", staging.path / "rows", progress=progress)
        notes = (*source.notes, *(str(note) for note in rewrite.changes.notes))
        report = MergeReport(staging.out, facts, rows, notes)
        return _finish(rewrite, files, staging, report)


def _open(base: str | Path, adapters: Sequence[Given], options: MergeOptions) -> tuple[Checkpoint, list[Addend]]:
    named = [parse_adapter(adapter) for adapter in adapters]
    if not named:
        message = "merge needs at least one adapter: name it after the base."
        raise OptionError(message)
    source, opened = _open_base(base, options.dtype), [_open_adapter(place) for place, _ in named]
    chosen = choose_names(opened, options.pairing)
    return source, [(adapter, weight) for adapter, (_, weight) in zip(chosen, named, strict=True)]


def _list_files(base: Checkpoint, adapters: Sequence[Addend]) -> list[Path]:
    sides: list[Checkpoint | AdapterIndex] = [base, *(adapter for adapter, _ in adapters)]
    return [place for side in sides for place in (side.root, *side.files)]


def _describe(base: Checkpoint, adapters: Sequence[Addend], options: MergeOptions) -> MergeIdentity:
    facts: MergeIdentity = {
        "kind": "merge",
        "base": identify_source(base),
        "adapters": [{**identify_source(adapter), "weight": weight} for adapter, weight in adapters],
        "dtype": options.dtype,
        "deltaspec": version("deltaspec"),
    }
    pairing = options.pairing
    if pairing.map:
        facts["map"] = list(pairing.map)
    if pairing.component:
        facts["component"] = pairing.component
    return facts


def _finish(rewrite: Rewrite, files: Files, staging: Staging, report: MergeReport) -> MergeReport:
    """Write what lies beside the weights in a folder, and move all to its place."""
    built = staging.path / "built"
    if staging.out.suffix == ".safetensors":
        staging.commit(built / staging.out.name)
        return report
    note = write_beside(rewrite, files, built)
    report = replace(report, notes=(*report.notes, *([note] if note else [])))
    with whole_file(built / "deltaspec.json") as stream:
        stream.write(json.dumps(report.to_dict(), indent=1, ensure_ascii=False).encode())
    staging.commit(built)
    return report


def parse_adapter(given: Given) -> tuple[str | Path, float]:
    """Split ``path:weight``; what exists on disk is a path, whatever colons it holds.

    Raises
    ------
    OptionError
        If the weight is NaN or infinity.
    """
    place, weight = given if isinstance(given, tuple) else (given, 1.0)
    if isinstance(given, str) and not _is_there(given):
        head, _, tail = given.rpartition(":")
        with suppress(ValueError):
            place, weight = (head, float(tail)) if head else (given, 1.0)
    if not math.isfinite(weight):
        message = f"The weight of '{place}' is {weight}: expected a number, such as 0.5."
        raise OptionError(message)
    return place, float(weight)


def _is_there(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long, nobody's home
        return False


def _identity(facts: MergeIdentity) -> dict[str, Any]:
    """Leave out what the user happened to call the inputs."""
    text = json.dumps(facts)
    return json.loads(text, object_hook=lambda row: {k: v for k, v in row.items() if k != "ref"})  # type: ignore[no-any-return]


def _open_base(base: str | Path, dtype: str) -> Checkpoint:
    source = open_plain(base)
    if isinstance(source, AdapterIndex):
        message = f"The base {source.ref} is an adapter: name the checkpoint first, then its adapters."
        raise PairingError(message)
    if source.layout:
        message = (
            f"Cannot merge into {source.ref}: its files are in {source.layout} layout, and adapters are for the model "
            f"in Hugging Face's; {CONVERT} first."
        )
        raise CheckpointError(message)
    coded = next((spec for spec in source.tensors.values() if spec.scale), None)
    if dtype == "auto" and coded:
        message = (
            f"Cannot merge into '{coded.name}' of {source.ref}: it is stored as {coded.dtype} with scales, too coarse "
            "for an update; pass --dtype bf16 (fp16, fp32) to dequantise the checkpoint."
        )
        raise CheckpointError(message)
    return source


def _open_adapter(place: str | Path) -> AdapterIndex:
    source = open_plain(place)
    if isinstance(source, Checkpoint):
        what = describe_module(source.tensors) or "a full checkpoint; deltaspec extract makes an adapter of it"
        message = f"Cannot merge {source.ref}: it is {what}."
        raise PairingError(message)
    return source
