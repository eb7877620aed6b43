"""The files of an adapter that PEFT saved: whole, or in shards."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from deltaspec.errors import CheckpointError
from deltaspec.files.tensor_reader import Contents
from deltaspec.io import shards
from deltaspec.io.weight_files import NUMBERED, missing_shards

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def choose_adapter(names: Collection[str]) -> str:
    """Choose from a folder's file names the one that leads to an adapter's weights: whole, an index, or a shard; "".

    >>> choose_adapter(["adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"])
    'adapter_model.safetensors.index.json'
    """
    for name in WEIGHTS:
        stem, _, suffix = name.rpartition(".")
        matches = (NUMBERED.fullmatch(other) for other in sorted(names))
        numbered = [
            match[0] for match in matches if match and (match["stem"], match["suffix"]) == (f"{stem}-", f".{suffix}")
        ]
        if found := next((other for other in (name, f"{name}.index.json", *numbered) if other in names), ""):
            return found
    return ""


def list_files(file: Path) -> tuple[Path, ...]:
    """List the files of an adapter's weights, from the one that ``choose_adapter`` chose.

    Raises
    ------
    CheckpointError
        If a shard is missing, or an index cannot be trusted.
    """
    if file.name.endswith(".json"):
        return tuple(file.parent / name for name in sorted(set(shards.read_index(file).values())))
    match = NUMBERED.fullmatch(file.name)
    if match is None:
        return (file,)
    pattern = f"{match['stem']}*{match['of']}{match['count']}{match['suffix']}"
    names = sorted(found.name for found in file.parent.glob(pattern))
    if missing := missing_shards(names):
        message = f"Cannot open '{file.parent}': '{missing[0]}' is missing beside its other shards; download it."
        raise CheckpointError(message)
    return tuple(file.with_name(name) for name in names)


def gather_adapter(file: Path) -> tuple[tuple[Path, ...], Contents]:
    """List an adapter's files and tensors, from what ``choose_adapter`` chose.

    Raises
    ------
    CheckpointError
        If one is missing or cannot be read.
    """
    if file.name.endswith(".json"):
        return shards.gather_indexed(file)
    files = list_files(file)
    return files, shards.gather(files)
