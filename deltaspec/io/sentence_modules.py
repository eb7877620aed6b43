"""The further modules of a sentence-transformers folder: what modules.json lists beside the model at its top.

Each has a folder of its own (``1_Pooling``, ``2_Dense``), with a config and perhaps weights. Its tensors are taken for
tensors of the model, under names that begin with the folder: ``2_Dense.linear.weight``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path, PureWindowsPath

from deltaspec.errors import CheckpointError
from deltaspec.io import shards, weight_files
from deltaspec.types import Checkpoint, Pieces, TensorSpec

LIST = "modules.json"
# The kinds that cannot be without weights, by the last part of their class: what modules.json says of a kind is its
# name alone.
WEIGHTED = ("Dense", "LayerNorm", "LSTM", "CNN", "WordEmbeddings", "WeightedLayerPooling", "StaticEmbedding")
FILES = 1000  # more than any module has


def list_folders(file: Path) -> dict[str, str]:
    """Read from modules.json each further module's folder, and the class that it names for it.

    Raises
    ------
    CheckpointError
        If it is no such list, or a folder lies outside its own.
    """
    try:
        rows = json.loads(file.read_bytes())
        found = [(row["path"], str(row.get("type", "")).rpartition(".")[2]) for row in rows]
        if not isinstance(rows, list):
            raise TypeError
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as cause:
        message = f"Cannot use '{file}': expected a list of modules, each with its path; download it again."
        raise CheckpointError(message) from cause
    folders = {}
    for given, kind in found:
        path = PureWindowsPath(given) if isinstance(given, str) else PureWindowsPath("..")  # knows both separators
        if path.anchor or ".." in path.parts or "\0" in str(path):
            message = f"Cannot use '{file}': it places a module in {given!r}, outside its own folder; do not trust it."
            raise CheckpointError(message)
        if path.parts:
            folders["/".join(path.parts)] = kind
    return folders


def with_modules(model: Checkpoint) -> Checkpoint:
    """Add the tensors of the modules that lie beside an opened model; the model as it is where there are none.

    Raises
    ------
    CheckpointError
        If modules.json cannot be trusted, or the weights of a module are missing or damaged.
    """
    root, tensors, files = model.root, dict(model.tensors), list(model.files)
    if not (root / LIST).is_file():
        return model
    folders = list_folders(root / LIST)
    for folder, kind in folders.items():
        held = _open_module(root, folder)
        if not held and kind in WEIGHTED:
            what = f"'{LIST}' lists a {kind} in '{folder}', whose weights are missing"
            message = f"Cannot open '{root}': {what}; download them."
            raise CheckpointError(message)
        tensors |= held
        files += sorted({spec.file for spec in held.values()})
    return replace(model, tensors=tensors, files=tuple(files), folders=tuple(folders))


def lacks_weights(root: Path) -> bool:
    """Tell whether a folder lists a module that cannot be without weights, and has none of it."""
    folders = list_folders(root / LIST) if (root / LIST).is_file() else {}
    kinds = [folder for folder, kind in folders.items() if kind in WEIGHTED]
    return not all(weight_files.choose_weights([file.name for file in inner_files(root, folder)]) for folder in kinds)


def _open_module(root: Path, folder: str) -> dict[str, TensorSpec]:
    """List the tensors of one module and of the folders inside it, each under its place from the root."""
    tensors: dict[str, TensorSpec] = {}
    places: defaultdict[Path, list[str]] = defaultdict(list)
    for path in inner_files(root, folder):
        places[path.parent].append(path.name)
    for place, names in places.items():
        files = weight_files.find_weights(place, names)
        indexed = bool(files) and weight_files.is_index(files[0].name)
        found, _ = shards.gather_indexed(files[0])[1] if indexed else shards.gather(files)
        prefix = ".".join(place.relative_to(root).parts)
        for name, spec in found.items():
            tensors[f"{prefix}.{name}"] = replace(spec, name=f"{prefix}.{name}", pieces=Pieces((spec,)))
    return tensors


def inner_files(root: Path, folder: str) -> list[Path]:
    """List the files of a module's folder and of those inside it, links out of the model's own place left out.

    Raises
    ------
    CheckpointError
        If there are too many.
    """
    homes = homes_of(root)
    found = []
    for path in sorted((root / folder).rglob("*")):
        if path.is_file() and any(path.resolve().is_relative_to(home) for home in homes):
            found.append(path)
        if len(found) > FILES:
            message = f"Cannot use '{root / folder}': a module with more than {FILES} files; check '{root / LIST}'."
            raise CheckpointError(message)
    return found


def homes_of(root: Path) -> list[Path]:
    """Return where a checkpoint's files may truly lie: in its folder, or in the hub's cache around it."""
    home = root.resolve()
    return [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])


def is_beside(name: str, model: Checkpoint) -> bool:
    """Tell whether a tensor belongs to a further module, which adapters of the model never reach.

    >>> is_beside("2_Dense.linear.weight", Checkpoint("", Path(), (), {}, folders=("1_Pooling", "2_Dense")))
    True
    """
    return any(name.startswith(folder.replace("/", ".") + ".") for folder in model.folders)
