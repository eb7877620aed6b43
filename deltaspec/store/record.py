"""One matrix's result ⇄ one safetensors file: arrays as tensors, the record as JSON in the header."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open

from deltaspec.errors import RunError
from deltaspec.types import MatrixKey, MatrixRecord, Spectrum

LONGEST_NAME = 180  # file systems take 255 bytes; suffixes need the rest


def file_stem(store_key: str) -> str:
    """Return a file name for any key: percent-encoded, so that no name can leave its folder; long ones hashed."""
    name = quote(store_key, safe="")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:140]}-{hashlib.sha256(store_key.encode()).hexdigest()[:24]}"


def encode(record: MatrixRecord, spectrum: Spectrum) -> bytes:
    """Serialise a record and its spectrum: values float64, vectors float32."""
    import torch  # here and in read_spectrum, so that showing a table loads no torch
    from safetensors.torch import save

    tensors = {"singular_values": spectrum.singular_values.contiguous()}
    for name, vectors in (("left", spectrum.left), ("right", spectrum.right)):
        if vectors is not None:
            tensors[name] = vectors.to(torch.float32).contiguous()
    header = {**asdict(record), "energy": spectrum.energy}
    return bytes(save(tensors, metadata={"record": json.dumps(header)}))


def read_json_header(path: Path, field: str) -> dict[str, Any]:
    """Read the JSON object that a safetensors file keeps under ``field`` of its header.

    Raises
    ------
    RunError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})[field])
    except (SafetensorError, OSError, KeyError, ValueError) as cause:
        message = f"The {field} {path} cannot be read ({cause}): delete it and run the same command again."
        raise RunError(message) from cause
    return header


def read_record(path: Path) -> MatrixRecord:
    """Read a record without its arrays."""
    header = read_json_header(path, "record")
    header.pop("energy")
    header["key"] = MatrixKey(**header["key"])
    header["shape"] = tuple(header["shape"])
    header["notes"] = tuple(header["notes"])
    return MatrixRecord(**header)


def read_spectrum(path: Path) -> Spectrum:
    """Read a record's singular values, and its vectors where they were kept."""
    import torch

    header = read_json_header(path, "record")
    with safe_open(path, framework="pt") as file:
        # Copied: a tensor that stays a view of the file would break when the file is replaced.
        arrays = {name: file.get_tensor(name).to(torch.float64, copy=True) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Spectrum(
        arrays["singular_values"],
        tuple(header["shape"]),
        header["energy"],
        header["method"],
        header["error_bound"],
        arrays.get("left"),
        arrays.get("right"),
    )
