"""Which files a source is: fingerprints of their content, that tell the same files again wherever they lie."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from deltaspec.errors import CheckpointError
from deltaspec.files import tensor_reader
from deltaspec.io import meta_layout
from deltaspec.io.file_formats import is_safetensors
from deltaspec.io.peft_files import CONFIG
from deltaspec.io.pickled_states import MARK, split_state
from deltaspec.io.sentence_modules import LIST
from deltaspec.types import Checkpoint, ForeignAdapter, Opened, SourceIdentity

SAMPLE = 4096
SAMPLES = 64


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
    settings = {"config.json" if isinstance(source, Checkpoint) else CONFIG: bool(source.config)}
    if isinstance(source, Checkpoint):
        settings |= {meta_layout.PARAMS: bool(source.layout), LIST: bool(source.folders)}
    found = [source.root / name for name, used in settings.items() if used]
    files = [*source.files, *(file for file in found if file.is_file())]
    _, state = split_state(source.ref)
    marks = dict.fromkeys(source.files, f"{MARK}{state}" if state else "")
    return {file.relative_to(source.root).as_posix() + marks.get(file, ""): _hash(file) for file in files}


def identify_source(source: Opened | ForeignAdapter) -> SourceIdentity:
    """Say which files a source is, for a manifest: what was asked for, revision, fingerprints, times of modification.

    Fingerprints are samples, so times are kept too: an edit between samples is not missed.
    """
    modified = {file.relative_to(source.root).as_posix(): file.stat().st_mtime_ns for file in source.files}
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
