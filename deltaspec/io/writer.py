"""Safetensors files, written one tensor at a time, and each file whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError, RunError
from deltaspec.io.pickled import DTYPES
from deltaspec.types import Entry

SAVED = {"format": "pt"}  # what transformers looks for before it loads
STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # what --dtype calls them
INDEX = "model.safetensors.index.json"
TORCH = {name: getattr(torch, kind) for kind, name in DTYPES.items() if hasattr(torch, kind) and "FNUZ" not in name}


def write_safetensors(path: Path, entries: Sequence[Entry], *, metadata: dict[str, str] | None = None) -> int:
    """Write tensors to one file, each read only when its turn comes and dropped after it.

    Parameters
    ----------
    path : Path
        Replaced if it is there, by a rename once everything is written.
    entries : sequence of Entry
        Written in their order, wider dtypes first, so that every tensor is aligned.
    metadata : dict of str, optional
        The header's ``__metadata__``.

    Returns
    -------
    int
        Bytes of the file.

    Raises
    ------
    RunError
        If the file cannot be written; nothing is left under its name then.
    CheckpointError
        If a name comes twice, a dtype has no place in the format, or what is read is not what its entry says.
    """
    ordered = sorted(entries, key=lambda entry: -size_of(entry.dtype, name=entry.name))
    header = _header(path, ordered, metadata)
    with whole_file(path) as stream:
        stream.write(header)
        for entry in ordered:
            _write_tensor(stream, entry, path=path)
        return stream.tell()


def write_index(path: Path, files: Mapping[str, Sequence[Entry]]) -> int:
    """Write the ``index.json`` of some files; returns the bytes of all tensors."""
    total = sum(
        size_of(entry.dtype, name=entry.name) * math.prod(entry.shape) for held in files.values() for entry in held
    )
    weight_map = {entry.name: name for name, held in files.items() for entry in held}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with whole_file(path) as stream:
        stream.write(json.dumps(content, indent=2).encode())
    return total


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a neighbour of ``path`` for writing, and rename it once the block has ended well.

    Raises
    ------
    RunError
        If the system refuses, for example on a full disk; the neighbour is deleted then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # some file systems report a full disk only here
        temporary.replace(path)
    except OSError as cause:
        raise unwritten(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


def unwritten(path: Path, cause: OSError) -> RunError:
    """Return the error for what the system refused to write."""
    message = f"Cannot write '{path}' ({cause.strerror or cause}): free space or rights there, then run it again."
    return RunError(message)


def size_of(dtype: str, *, name: str) -> int:
    """Return the bytes of one element.

    Raises
    ------
    CheckpointError
        If the safetensors format has no such dtype.
    """
    if dtype not in TORCH:
        message = f"Cannot write '{name}' as {dtype}: safetensors stores {', '.join(TORCH)}; cast it with --dtype."
        raise CheckpointError(message)
    kind: torch.dtype = TORCH[dtype]
    return kind.itemsize


def _header(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None) -> bytes:
    """Return the 8 bytes of length and the JSON, padded so that data begin at a multiple of 8."""
    found: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        if entry.name in found or entry.name == "__metadata__":
            message = f"Cannot write '{entry.name}' into '{path}' twice, or under a reserved name: rename one."
            raise CheckpointError(message)
        start, end = end, end + size_of(entry.dtype, name=entry.name) * math.prod(entry.shape)
        found[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(stream: BinaryIO, entry: Entry, *, path: Path) -> None:
    tensor: Tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != TORCH[entry.dtype]:
        message = (
            f"Cannot write '{entry.name}' into '{path}': expected shape {entry.shape} and dtype {entry.dtype}, found "
            f"{tuple(tensor.shape)} and {tensor.dtype}; its source has changed since it was opened, start again."
        )
        raise CheckpointError(message)
    if tensor.numel():
        stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
