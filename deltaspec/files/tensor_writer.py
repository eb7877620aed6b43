"""Safetensors files, written one tensor at a time, and each file whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.files.atomic import whole_file
from deltaspec.files.dtypes import DTYPES, name_of
from deltaspec.types import Entry

STORABLE = [dtype.name for dtype in DTYPES.values() if dtype.storable and hasattr(torch, dtype.kind)]
SAVED = {"format": "pt"}  # what transformers looks for before it loads


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


def size_of(dtype: str, *, name: str) -> int:
    """Return the bytes of one element.

    Raises
    ------
    CheckpointError
        If the safetensors format has no such dtype.
    """
    if dtype not in STORABLE:
        message = f"Cannot write '{name}' as {dtype}: safetensors stores {', '.join(STORABLE)}; cast it with --dtype."
        raise CheckpointError(message)
    return DTYPES[dtype].width


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
    if tuple(tensor.shape) != entry.shape or tensor.dtype != DTYPES[entry.dtype].torch:
        message = (
            f"Cannot write '{entry.name}' into '{path}': expected shape {entry.shape} and dtype {entry.dtype}, found "
            f"{tuple(tensor.shape)} and {tensor.dtype}; start again if a source was replaced meanwhile, else report it."
        )
        raise CheckpointError(message)
    if tensor.numel():
        stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, whole or not at all."""
    write_safetensors(file, list_entries(tensors), metadata=metadata)


def list_entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return tensors that are in memory as what ``write_safetensors`` takes."""
    return [Entry(n, tuple(t.shape), name_of(t.dtype), partial(tensors.__getitem__, n)) for n, t in tensors.items()]
