"""Weight files, single or sharded: their indexes, headers and tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

from deltaspec.errors import CheckpointError
from deltaspec.files import tensor_reader
from deltaspec.files.atomic import write_whole
from deltaspec.files.json_file import read_json
from deltaspec.files.tensor_reader import Contents
from deltaspec.files.tensor_writer import size_of
from deltaspec.io import pickled
from deltaspec.io.file_formats import describe_foreign, is_pickled
from deltaspec.types import Entry, TensorSpec

INDEX = "model.safetensors.index.json"


def read_index(index: Path) -> dict[str, str]:
    """Read which file holds which tensor from an ``index.json``; files are named relative to its folder.

    Raises
    ------
    CheckpointError
        If there is no such map, or a file named in it lies outside the index's folder.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        message = f"Cannot use '{index}': expected 'weight_map' with a file name for each tensor; download it again."
        raise CheckpointError(message)
    for name, file in found.items():
        path = PureWindowsPath(
            file
        )  # knows both separators; the target of a link is not looked at: hub caches use links
        if path.anchor or ".." in path.parts or not path.parts or "\0" in file:
            message = f"Cannot use '{index}': it places '{name}' in '{file}', outside its own folder; do not trust it."
            raise CheckpointError(message)
    return found


def list_tensors(file: Path, state: str = "") -> Contents:
    """List the tensors of one file of either format, by its content, and the names it says were left out as shared.

    Parameters
    ----------
    file : Path
    state : str
        Which dictionary of a pickled file; "" where one alone holds weights.

    Raises
    ------
    CheckpointError
        If it is damaged, in another format, which is named, or a pickled file holds code.
    """
    if what := describe_foreign(file):
        message = f"Cannot read '{file}': it is {what}."
        raise CheckpointError(message)
    if is_pickled(file):
        return pickled.list_tensors(file, state)
    if state:
        message = f"Cannot find '{state}' in '{file}': safetensors hold one dictionary; open the file by its own name."
        raise CheckpointError(message)
    return tensor_reader.list_tensors(file)


def gather(files: Iterable[Path], state: str = "") -> Contents:
    """List the tensors of several files, whose names must differ; ``state`` as in ``list_tensors``.

    Raises
    ------
    CheckpointError
        If two files hold a tensor of one name, or a file cannot be read.
    """
    tensors: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    owner: dict[str, Path] = {}
    for file in files:
        found, shared = list_tensors(file, state)
        for name in (*found, *shared):
            if name in owner:
                message = (
                    f"Cannot tell which '{name}' is meant: both '{owner[name]}' and '{file}' hold it; if they are two "
                    "copies of a model, open one by its own path; if each is a tensor-parallel rank with a part of "
                    "every tensor, join the ranks and convert them to a Hugging Face folder."
                )
                raise CheckpointError(message)
            owner[name] = file
        tensors |= found
        aliases |= shared
    return tensors, aliases


def gather_indexed(index: Path) -> tuple[tuple[Path, ...], Contents]:
    """List the tensors of the shards that an index names, also those that it forgot.

    Raises
    ------
    CheckpointError
        If the index is wrong, or a shard lacks a tensor that the index places there.
    """
    weight_map = read_index(index)
    files = tuple(index.parent / file for file in sorted(set(weight_map.values())))
    if missing := next((file.name for file in files if not file.is_file()), None):
        message = f"Cannot open '{index.parent}': '{index.name}' names '{missing}', which is missing; download it."
        raise CheckpointError(message)
    tensors, aliases = gather(files)
    for name, file in weight_map.items():
        holder = tensors.get(aliases.get(name, name))
        if holder is None or holder.file != index.parent / file:
            message = f"Cannot find '{name}' in '{index.parent / file}', where '{index.name}' places it; download both."
            raise CheckpointError(message)
    return files, (tensors, aliases)


def write_index(path: Path, files: Mapping[str, Sequence[Entry]]) -> int:
    """Write the ``index.json`` of some files; returns the bytes of all tensors."""
    total = sum(
        size_of(entry.dtype, name=entry.name) * math.prod(entry.shape) for held in files.values() for entry in held
    )
    weight_map = {entry.name: name for name, held in files.items() for entry in held}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_whole(path, json.dumps(content, indent=2).encode())
    return total
