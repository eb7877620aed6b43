"""A path or a hub id becomes an index of its tensors: only headers are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError
from deltaspec.files import json_file
from deltaspec.io import hub, kohya, peft, pickled, shards
from deltaspec.io.file_formats import (
    CONVERT,
    SUFFIXES,
    UNREADABLE,
    describe_foreign,
    is_pickled,
    may_hold_weights,
)
from deltaspec.io.foreign_marks import find_factor
from deltaspec.io.peft_files import CONFIG, WEIGHTS, choose_adapter
from deltaspec.io.pickled_states import split_state
from deltaspec.io.quantisation_config import read_quantisation
from deltaspec.io.quantised import attach_scales
from deltaspec.types import AdapterIndex, Checkpoint, ForeignAdapter, Opened

FOREIGN_LORA = re.compile(r".*(lora_(embedding_)?[AB]\b|lora_(up|down)\.weight$|\.lora\.(up|down)\.weight$)")


def open_plain(ref: str | Path) -> Opened:
    """Open a checkpoint or a LoRA adapter as ``open_source`` does, and refuse any other adapter.

    Raises
    ------
    CheckpointError
        As of ``open_source``, or if it is an adapter whose change cannot be read off its files.
    """
    found = open_source(ref)
    if isinstance(found, ForeignAdapter):
        raise CheckpointError(found.refusal)
    if isinstance(found, AdapterIndex) and found.conditional:
        message = (
            f"Cannot use '{ref}': it is {found.conditional}, a change that no weights can hold, so that it can be "
            "neither merged, verified nor written as a LoRA; deltaspec analyze reads its factors."
        )
        raise CheckpointError(message)
    return found


def open_source(ref: str | Path) -> Opened | ForeignAdapter:
    """Open a checkpoint or an adapter, and say which it is; only headers are read.

    Parameters
    ----------
    ref : str or Path
        A folder, a file (safetensors or pickled, by its content; index.json), one dictionary of a pickled file,
        ``FILE::NAME``, or a hub id ``owner/name[@revision]``. What exists on disk is never taken for a hub id.

    Returns
    -------
    Checkpoint, AdapterIndex or ForeignAdapter
        The last is an adapter that is not plain LoRA.

    Raises
    ------
    CheckpointError
        If it is not there, damaged, or in a format that cannot be read, which is named.
    """
    try:
        path = Path(ref).expanduser()
        if path.is_dir() and str(ref):
            return _open_folder(path, ref=str(ref))
        if path.is_file():
            return _open_file(path, ref=str(ref))
        file, state = split_state(ref)
        if state and (path := Path(file).expanduser()).is_file():
            return _open_file(path, ref=str(ref), state=state)
    except (OSError, RuntimeError) as cause:  # no permission, a name too long, nobody's home
        message = f"Cannot open '{ref}' ({cause}): check the path and your rights to read it."
        raise CheckpointError(message) from cause
    found = None if isinstance(ref, Path) else hub.parse_id(ref, suffixes=(*SUFFIXES, *UNREADABLE, ".json"))
    if found is None:
        message = (
            f"Cannot open '{ref}': there is no such file or folder, and a model of the hub is named owner/name or "
            "owner/name@revision; check the path."
        )
        raise CheckpointError(message)
    folder, revision = hub.fetch(*found)
    return replace(_open_folder(folder, ref=str(ref)), revision=revision)


def _open_folder(folder: Path, *, ref: str) -> Opened | ForeignAdapter:
    names = sorted(entry.name for entry in folder.iterdir())
    if CONFIG in names and choose_adapter(names):
        return peft.open_adapter(folder, ref=ref)
    config = _read_config(folder)
    chosen = shards.choose_weights(names)
    if not chosen:
        raise CheckpointError(_nothing_readable(folder, names))
    if len(chosen) > 1 and (missing := shards.missing_shards(chosen)):
        message = f"Cannot open '{folder}': '{missing[0]}' is missing beside its other shards; download it."
        raise CheckpointError(message)
    return _open_weights([folder / name for name in chosen], ref=ref, config=config)


def _open_file(file: Path, *, ref: str, state: str = "") -> Opened | ForeignAdapter:
    folder = file.parent
    if (file.name == CONFIG or choose_adapter([file.name])) and (folder / CONFIG).is_file():
        return peft.open_adapter(folder, ref=ref)
    if not file.name.endswith(".index.json") and not may_hold_weights(file):
        what = describe_foreign(file) or f"none of {', '.join(SUFFIXES)} and index.json; {CONVERT}"
        message = f"Cannot open '{file}': it is {what}."
        raise CheckpointError(message)
    return _open_weights([file], ref=ref, config=_read_config(folder), state=state)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json_file.read_json(path) if path.is_file() else {}


def _open_weights(files: list[Path], *, ref: str, config: dict[str, Any], state: str = "") -> Opened | ForeignAdapter:
    """List the tensors of one index, or of files that belong together."""
    told = read_quantisation(config, files[0].parent, source=files[0])
    if files[0].name.endswith(".json"):
        opened, (tensors, aliases) = shards.gather_indexed(files[0])
    else:
        opened, (tensors, aliases) = tuple(files), shards.gather(files, state)
    if not tensors:
        message = f"Cannot use '{files[0]}': it holds no tensors; check that it is a model's weights."
        raise CheckpointError(message)
    name, kind = find_factor(tensors)
    if kind:
        message = (
            f"Cannot use '{name}' in '{files[0]}': it is of {kind}; merge it into its base with the tool it is from."
        )
        raise CheckpointError(message)
    if kohya.is_kohya(tensors):
        return kohya.index_adapter(files[0], tensors, ref=ref)
    if lora := next((name for name in tensors if FOREIGN_LORA.match(name)), None):
        return _open_lora(files[0], lora, ref=ref)
    tensors = attach_scales(tensors, told)
    notes = () if state else tuple(note for file in opened if is_pickled(file) for note in pickled.note_left(file))
    return Checkpoint(ref, files[0].parent, opened, tensors, config=config, aliases=aliases, notes=notes)


def _open_lora(file: Path, name: str, *, ref: str) -> Opened | ForeignAdapter:
    """Open a file of LoRA factors by the config beside it, or say that there is none."""
    folder = file.parent
    if (folder / CONFIG).is_file():
        return peft.open_adapter(folder, ref=ref, file=file)
    other = next((path.name for path in sorted(folder.glob(f"*{Path(CONFIG).stem}*.json"))), "")
    way = f"rename '{other}' to that if it is this adapter's" if other else "convert it to PEFT's format"
    message = (
        f"Cannot use '{file}': '{name}' is a LoRA factor without '{CONFIG}' beside it, which gives its scale; {way}, "
        "or merge it into its base."
    )
    raise CheckpointError(message)


def _nothing_readable(folder: Path, names: list[str]) -> str:
    """Say what a folder holds instead of weights, and what to do."""
    for suffix, what in UNREADABLE.items():
        if found := next((name for name in names if name.endswith(suffix)), None):
            return f"Cannot open '{folder}': '{found}' is {what}."
    if CONFIG in names:
        return f"Cannot open '{folder}': it has '{CONFIG}' and none of {', '.join(WEIGHTS)}; download them."
    inner = [
        name
        for name in names
        if (folder / name).is_dir() and shards.choose_weights([entry.name for entry in (folder / name).iterdir()])
    ]
    if inner:
        return f"Cannot open '{folder}': its weights lie in folders; open one of {', '.join(inner)}."
    if held := next((name for name in names if (folder / name).is_file() and may_hold_weights(folder / name)), None):
        return (
            f"Cannot open '{folder}': which of its files are the weights is not told by '{held}'; open it by its path."
        )
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return f"Cannot open '{folder}': expected {', '.join(SUFFIXES)} or an index.json, found {listed}; check the path."
