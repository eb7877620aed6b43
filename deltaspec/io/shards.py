"""Weight files, single or sharded: which files belong together, their indexes, headers and tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

from deltaspec.errors import CheckpointError
from deltaspec.files import tensor_reader
from deltaspec.files.atomic import write_whole
from deltaspec.files.json_file import read_json
from deltaspec.files.tensor_reader import Contents
from deltaspec.files.tensor_writer import size_of
from deltaspec.io import pickled
from deltaspec.io.file_formats import ORDER, describe_foreign, is_pickled
from deltaspec.types import Entry, TensorSpec

WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin")
INDEX = "model.safetensors.index.json"
TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)")
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)")


def choose_weights(names: Collection[str]) -> tuple[str, ...]:
    """Choose from a folder's file names those to open: one index, or the files that hold all weights.

    Safetensors come before pickled files and those before training checkpoints (.ckpt), an index before single files,
    and the customary name before others; several files without an index are taken together.

    Parameters
    ----------
    names : collection of str
        File names of one folder.

    Returns
    -------
    tuple of str
        One ``*.index.json``, or weight files; empty where there are none.

    Examples
    --------
    >>> choose_weights(["config.json", "pytorch_model.bin", "model.safetensors"])
    ('model.safetensors',)
    """
    top = sorted((name for name in names if "/" not in name), key=lambda name: (len(name), name))
    for suffixes in ORDER:
        indexes = [name for name in top if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        customary = [name for name in WHOLE if name in top and name.endswith(suffixes)]
        if indexes or customary:
            return (indexes[0],) if indexes else (customary[0],)
        others = [name for name in top if name.endswith(suffixes) and not TRAINING_STATE.match(name)]
        if others:
            return tuple(sorted(others))
    return ()


def missing_shards(names: Collection[str]) -> list[str]:
    """Return the files that the numbering of others (…-00001-of-00003…) promises and that are not there.

    >>> missing_shards(["model-00001-of-00002.safetensors"])
    ['model-00002-of-00002.safetensors']
    """
    promised: set[str] = set()
    for name in names:
        if match := NUMBERED.fullmatch(name):
            stem, _, count, suffix = match.groups()
            promised |= {f"{stem}-{number + 1:05d}-of-{count}{suffix}" for number in range(int(count))}
    return sorted(promised - set(names))


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
                    f"Cannot tell which '{name}' is meant: both '{owner[name]}' and '{file}' hold it; "
                    "remove one, or open one file by its own path."
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
