"""Safetensors files: their headers, checked, and tensors mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from deltaspec.errors import CheckpointError
from deltaspec.types import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Contents = tuple[
    dict[str, TensorSpec], dict[str, str]
]  # tensors by name; alias → the stored name it shares memory with

LFS_POINTER = b"version https://git-lfs"


def read_header(file: Path) -> tuple[bytes, dict[str, Any]]:
    """Read the header of a safetensors file, checked by the safetensors library.

    Returns
    -------
    bytes, dict
        The file's first 8 bytes and header as stored; name → dtype, shape, data_offsets.

    Raises
    ------
    CheckpointError
        If the file is truncated, its header is not JSON, lies about offsets, or names a tensor twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            message = f"Cannot read '{file}': its header names '{twice}' twice; download it again."
            raise CheckpointError(message)
        return found

    try:
        with file.open("rb") as stream:
            raw = stream.read(8)
            if LFS_POINTER.startswith(raw) and raw:
                message = f"Cannot read '{file}': it is a git-lfs pointer, not the weights; run git lfs pull."
                raise CheckpointError(message)
            with safe_open(file, framework="pt"):
                raw += stream.read(int.from_bytes(raw, "little"))
        return raw, json.loads(raw[8:], object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError, SafetensorError) as cause:
        message = f"Cannot read '{file}' as safetensors ({cause}): it is damaged or truncated; download it again."
        raise CheckpointError(message) from cause


def list_tensors(file: Path) -> Contents:
    """List the tensors of one safetensors file from its header, and the names it says were left out as shared."""
    _, header = read_header(file)
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: TensorSpec(name, file, tuple(entry["shape"]), entry["dtype"])
        for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    }
    shared = {name: kept for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return tensors, shared


def load_tensor(spec: TensorSpec) -> Tensor:
    """Map one tensor into memory in its stored dtype; dropping the result unmaps the file.

    Raises
    ------
    CheckpointError
        If the file has changed since its header was read.
    """
    try:
        with safe_open(spec.file, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(spec.stored_name)
    except (OSError, ValueError, SafetensorError) as cause:
        message = f"Cannot read '{spec.name}' from '{spec.file}' ({cause}): download the file again."
        raise CheckpointError(message) from cause
    return tensor
