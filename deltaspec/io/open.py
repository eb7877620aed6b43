"""A path or a hub id becomes an index of its tensors: only headers are read."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError
from deltaspec.files import json_file, tensor_reader
from deltaspec.io import hub, kohya, peft, shards
from deltaspec.io.file_formats import CONVERT, SUFFIXES, UNREADABLE, describe_foreign, is_safetensors, may_hold_weights
from deltaspec.io.quantisation_config import read_quantisation
from deltaspec.io.quantised import attach_scales
from deltaspec.types import Checkpoint, ForeignAdapter, Opened, SourceIdentity

FOREIGN_LORA = re.compile(r".*(lora_(embedding_)?[AB]\b|lora_(up|down)\.weight$|\.lora\.(up|down)\.weight$)")
SAMPLE = 4096
SAMPLES = 64


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
    return found


def open_source(ref: str | Path) -> Opened | ForeignAdapter:
    """Open a checkpoint or an adapter, and say which it is; only headers are read.

    Parameters
    ----------
    ref : str or Path
        A folder, a file (safetensors or pickled, by its content; index.json), or a hub id ``owner/name[@revision]``.
        What exists on disk is never taken for a hub id.

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
    if peft.CONFIG in names and any(name in names for name in peft.WEIGHTS):
        return peft.open_adapter(folder, ref=ref)
    config = _read_config(folder)
    chosen = shards.choose_weights(names)
    if not chosen:
        raise CheckpointError(_nothing_readable(folder, names))
    if len(chosen) > 1 and (missing := shards.missing_shards(chosen)):
        message = f"Cannot open '{folder}': '{missing[0]}' is missing beside its other shards; download it."
        raise CheckpointError(message)
    return _open_weights([folder / name for name in chosen], ref=ref, config=config)


def _open_file(file: Path, *, ref: str) -> Opened | ForeignAdapter:
    folder = file.parent
    if file.name in (peft.CONFIG, *peft.WEIGHTS) and (folder / peft.CONFIG).is_file():
        return peft.open_adapter(folder, ref=ref)
    if not file.name.endswith(".index.json") and not may_hold_weights(file):
        what = describe_foreign(file) or f"none of {', '.join(SUFFIXES)} and index.json; {CONVERT}"
        message = f"Cannot open '{file}': it is {what}."
        raise CheckpointError(message)
    return _open_weights([file], ref=ref, config=_read_config(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json_file.read_json(path) if path.is_file() else {}


def _open_weights(files: list[Path], *, ref: str, config: dict[str, Any]) -> Opened:
    """List the tensors of one index, or of files that belong together."""
    told = read_quantisation(config, files[0].parent, source=files[0])
    if files[0].name.endswith(".json"):
        opened, (tensors, aliases) = shards.gather_indexed(files[0])
    else:
        opened, (tensors, aliases) = tuple(files), shards.gather(files)
    if not tensors:
        message = f"Cannot use '{files[0]}': it holds no tensors; check that it is a model's weights."
        raise CheckpointError(message)
    if kohya.is_kohya(tensors):
        return kohya.index_adapter(files[0], tensors, ref=ref)
    if lora := next((name for name in tensors if FOREIGN_LORA.match(name)), None):
        message = (
            f"Cannot use '{files[0]}': '{lora}' is a LoRA factor without '{peft.CONFIG}' beside it, which gives its "
            "scale; convert it to PEFT's format, or merge it into its base."
        )
        raise CheckpointError(message)
    tensors = attach_scales(tensors, told)
    return Checkpoint(ref, files[0].parent, opened, tensors, config=config, aliases=aliases)


def _nothing_readable(folder: Path, names: list[str]) -> str:
    """Say what a folder holds instead of weights, and what to do."""
    for suffix, what in UNREADABLE.items():
        if found := next((name for name in names if name.endswith(suffix)), None):
            return f"Cannot open '{folder}': '{found}' is {what}."
    if peft.CONFIG in names:
        return f"Cannot open '{folder}': it has '{peft.CONFIG}' and none of {', '.join(peft.WEIGHTS)}; download them."
    inner = [
        name
        for name in names
        if (folder / name).is_dir() and shards.choose_weights([entry.name for entry in (folder / name).iterdir()])
    ]
    if inner:
        return f"Cannot open '{folder}': its weights lie in folders; open one of {', '.join(inner)}."
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
    return f"Cannot open '{folder}': expected {', '.join(SUFFIXES)} or an index.json, found {listed}; check the path."


def fingerprint(source: Opened | ForeignAdapter) -> dict[str, str]:
    """Hash a checkpoint's files from their sizes, headers and samples, never reading them whole.

    Returns
    -------
    dict of str
        File name within the checkpoint → 32 hexadecimal digits; the same wherever and whenever the file was copied.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    """
    settings = source.root / ("config.json" if isinstance(source, Checkpoint) else peft.CONFIG)
    files = [*source.files, *([settings] if source.config and settings.is_file() else [])]
    return {file.relative_to(source.root).as_posix(): _hash(file) for file in files}


def identify_source(source: Opened | ForeignAdapter) -> SourceIdentity:
    """Say which files a source is, for a manifest: what was asked for, revision, fingerprints, times of modification.

    Fingerprints are samples, so times are kept too: an edit between samples is not missed.
    """
    modified = {file.name: file.stat().st_mtime_ns for file in source.files}
    return {"ref": source.ref, "revision": source.revision, "files": fingerprint(source), "modified": modified}


def _hash(file: Path) -> str:
    try:
        digest = hashlib.sha256(str(file.stat().st_size).encode())
        with file.open("rb", buffering=0) as stream:
            for start, length in _samples(file, digest):
                stream.seek(start)
                digest.update(stream.read(length))
    except (OSError, zipfile.BadZipFile, NotImplementedError) as cause:  # the last for unknown zip versions
        message = f"Cannot read '{file}' ({cause}): check that it is still there and whole."
        raise CheckpointError(message) from cause
    return digest.hexdigest()[:32]


def _samples(file: Path, digest: hashlib._Hash) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of what is hashed of a file; what its format knows about itself goes in at once."""
    size = file.stat().st_size
    if file.name.endswith(".json"):
        yield 0, size
    elif is_safetensors(file):
        raw, header = tensor_reader.read_header(file)
        digest.update(raw)
        for entry in (entry for name, entry in header.items() if name != "__metadata__"):
            begin, end = (len(raw) + offset for offset in entry["data_offsets"])
            length = min(SAMPLE, end - begin)
            yield from ((start, length) for start in (begin, (begin + end - length) // 2, end - length))
    else:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # its directory holds a checksum of every tensor
                digest.update(repr([(record.filename, record.CRC) for record in archive.infolist()]).encode())
        step = max(size - SAMPLE, 0) / (SAMPLES - 1)
        yield from ((round(number * step), SAMPLE) for number in range(SAMPLES))
