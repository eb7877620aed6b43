"""Second moments of layer inputs, one safetensors file: what ``calibrate`` writes and ``extract --calibration`` reads.

Each tensor is named after the checkpoint's weight whose inputs it describes, and holds the upper triangle of
S = Σ x·xᵀ row by row, (d_in·(d_in+1)/2,) F32. The header's ``about`` is JSON: ``model`` (ref, revision, files with
fingerprints), ``text`` (name, sha256), ``tokens``, ``options``, ``aliases`` (tensor → the stored one whose
inputs are its own) and ``left_out`` (tensor and reason).

Summed in float64, stored in float32: each element is wrong by at most 6e-8 of itself, so the energy that S gives to a
direction v is wrong by at most 6e-8·(Σ|vᵢ|√Sᵢᵢ)²; an eigenvalue below about 1e-7 of the largest may come back
slightly negative. Measured on a fine-tune of MiniLM-L6 (8,192 tokens, S of condition 2e9): rank-16 factors from the
rounded S have the same error to 1e-15, and the error read from it is off by 6e-9 of itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError, NumericalError
from deltaspec.files import tensor_reader
from deltaspec.files.tensor_writer import write_safetensors
from deltaspec.types import Entry, TensorSpec

FORMAT, VERSION = "deltaspec-moments", 1
PART = "moments"
ROWS = 512
FIELDS: dict[str, type] = {
    "model": dict,
    "text": dict,
    "tokens": int,
    "options": dict,
    "aliases": dict,
    "left_out": list,
}


@dataclass(frozen=True, slots=True)
class Moments:
    """An opened file of second moments; matrices are read when they are asked for. ``about`` as in the header."""

    path: Path
    about: dict[str, Any]
    tensors: dict[str, TensorSpec]

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that have moments, aliases included."""
        return (*self.tensors, *self.about["aliases"])

    def get(self, name: str) -> Tensor | None:
        """Return S = Σ x·xᵀ of one weight's inputs, (d_in, d_in) float64, symmetric; None where there is none.

        Raises
        ------
        NumericalError
            If it holds NaN, infinity, or a negative square.
        CheckpointError
            If the file has changed since it was opened.
        """
        spec = self.tensors.get(self.about["aliases"].get(name, name))
        if spec is None:
            return None
        packed = tensor_reader.load_tensor(spec)
        if tuple(packed.shape) != spec.shape:
            message = f"Cannot read '{spec.name}' from '{self.path}': the file has changed since it was opened."
            raise CheckpointError(message)
        matrix = unpack(packed)
        if not bool(torch.isfinite(packed).all()) or bool((matrix.diagonal() < 0).any()):
            message = (
                f"The moments '{spec.name}' in '{self.path}' hold NaN, infinity or a negative square: "
                "run deltaspec calibrate again."
            )
            raise NumericalError(message)
        return matrix


def open_moments(path: str | Path) -> Moments:
    """Open a file that ``calibrate`` wrote; only its header is read.

    Raises
    ------
    CheckpointError
        If it is not there, no such file, damaged, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        message = f"Cannot open the moments '{path}': there is no such file; deltaspec calibrate writes one."
        raise CheckpointError(message)
    _, header = tensor_reader.read_header(path)
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        message = f"Cannot use '{path}': it is no file of moments; pass one that deltaspec calibrate wrote."
        raise CheckpointError(message)
    if metadata.get("version") != str(VERSION):
        message = f"Cannot read '{path}': its format version is {metadata.get('version')}, expected {VERSION}; upgrade."
        raise CheckpointError(message)
    tensors = {name: TensorSpec(name, path, tuple(e["shape"]), e["dtype"]) for name, e in header.items()}
    try:
        about = json.loads(metadata.get("about", ""))
    except (ValueError, RecursionError):
        about = None
    if wrong := _wrong(about, tensors):
        message = f"Cannot use the moments '{path}': {wrong}; run deltaspec calibrate again."
        raise CheckpointError(message)
    return Moments(path, about, tensors)


def _wrong(about: object, tensors: Mapping[str, TensorSpec]) -> str:
    """Say what makes no sense in a header; "" if all does."""
    if not isinstance(about, dict):
        return "its header does not say what it is about"
    for name, kind in FIELDS.items():
        if not isinstance(about.get(name), kind):
            return f"its header has no '{name}' of type {kind.__name__}"
    for name, spec in tensors.items():
        size = spec.shape[0] if len(spec.shape) == 1 else 0
        if spec.dtype != "F32" or not size or size != _size(_side(size)):
            return f"'{name}' is {spec.dtype} {spec.shape}, expected the triangle of a matrix in F32"
    for name, target in about["aliases"].items():
        if not isinstance(target, str) or target not in tensors or name in tensors:
            return f"its alias '{name}' points to {target!r}, which is not stored or not alone"
    return ""


def _size(side: int) -> int:
    return side * (side + 1) // 2


def _side(size: int) -> int:
    return (math.isqrt(8 * size + 1) - 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """Take the upper triangle of S, row by row, rounded to float32.

    Parameters
    ----------
    matrix : Tensor, (n, n)
        Only its upper triangle is read.

    Returns
    -------
    Tensor, (n·(n+1)/2,), float32, on the CPU
    """
    side, start = matrix.shape[0], 0
    packed = torch.empty(_size(side), dtype=torch.float32)
    for row in range(side):
        packed[start : start + side - row] = matrix[row, row:]
        start += side - row
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Return the symmetric matrix (n, n), float64, whose upper triangle ``packed`` holds row by row."""
    side, start = _side(packed.shape[0]), 0
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        matrix[row, row:] = packed[start : start + side - row]
        start += side - row
    for top in range(0, side, ROWS):  # in blocks: no second matrix, and no column written alone
        bottom = min(top + ROWS, side)
        matrix[bottom:, top:bottom] = matrix[top:bottom, bottom:].mT
        block = matrix[top:bottom, top:bottom]
        block += block.triu(1).mT
    return matrix


def write_part(path: Path, matrix: Tensor) -> None:
    """Store one S, in float32 and whole or not at all, for ``write_moments`` to join; of zeros only that it is empty.

    Raises
    ------
    NumericalError
        If it does not fit into float32.
    RunError
        If the system refuses to write.
    """
    packed = pack(matrix)
    if not bool(torch.isfinite(packed).all()):
        message = f"The moments '{path.stem}' exceed float32: the model's activations are broken, check its weights."
        raise NumericalError(message)
    if not bool(matrix.diagonal().any()):
        packed = packed[:0]
    write_safetensors(path, [Entry(PART, tuple(packed.shape), "F32", lambda: packed)])


def is_empty(part: Path) -> bool:
    """Tell whether a part that ``write_part`` wrote is of zeros: no input but zero ever came."""
    return tensor_reader.list_tensors(part)[0][PART].shape == (0,)


def write_moments(path: Path, parts: Mapping[str, Path], about: Mapping[str, Any]) -> None:
    """Join stored parts to one file, whole or not at all; equal parts and ``about`` give equal bytes.

    Parameters
    ----------
    path : Path
    parts : mapping
        Tensor name → file that ``write_part`` wrote.
    about : mapping
        See the head of this module.

    Raises
    ------
    RunError
        If the system refuses to write.
    """
    entries = []
    for name, part in parts.items():
        spec = tensor_reader.list_tensors(part)[0][PART]
        entries.append(Entry(name, spec.shape, "F32", partial(tensor_reader.load_tensor, spec)))
    said = json.dumps(about, sort_keys=True, ensure_ascii=False)
    write_safetensors(path, entries, metadata={"format": FORMAT, "version": str(VERSION), "about": said})
