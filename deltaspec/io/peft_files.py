"""The files of an adapter that PEFT saved: whole, or in shards."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from deltaspec.errors import CheckpointError
from deltaspec.files.tensor_reader import Contents
from deltaspec.io import shards

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def choose_adapter(names: Collection[str]) -> str:
    """Choose from a folder's file names the one that leads to an adapter's weights: whole, an index, or a shard; "".

    >>> choose_adapter(["adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"])
    'adapter_model.safetensors.index.json'
    """
    for name in WEIGHTS:
        stem, _, suffix = name.rpartition(".")
        matches = (shards.NUMBERED.fullmatch(other) for other in sorted(names))
        numbered = [match[0] for match in matches if match and (match[1], match[4]) == (stem, f".{suffix}")]
        if found := next((other for other in (name, f"{name}.index.json", *numbered) if other in names), ""):
            return found
    return ""


def gather_adapter(file: Path) -> tuple[tuple[Path, ...], Contents]:
    """List an adapter's files and tensors, from what ``choose_adapter`` chose.

    Raises
    ------
    CheckpointError
        If one is missing or cannot be read.
    """
    if file.name.endswith(".json"):
        return shards.gather_indexed(file)
    match = shards.NUMBERED.fullmatch(file.name)
    if match is None:
        return (file,), shards.list_tensors(file)
    files = sorted(found.name for found in file.parent.glob(f"{match[1]}-*-of-{match[3]}{match[4]}"))
    if missing := shards.missing_shards(files):
        message = f"Cannot open '{file.parent}': '{missing[0]}' is missing beside its other shards; download it."
        raise CheckpointError(message)
    return tuple(file.with_name(name) for name in files), shards.gather(file.with_name(name) for name in files)
