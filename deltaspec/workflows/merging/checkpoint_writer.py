"""The files of a checkpoint, written again with some of its tensors changed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from deltaspec.errors import OptionError
from deltaspec.files.atomic import whole_file
from deltaspec.files.dtypes import DTYPES, GRIDS, OPTIONS
from deltaspec.files.tensor_reader import read_header
from deltaspec.files.tensor_writer import SAVED, write_safetensors
from deltaspec.io.companions import adjust_config, copy_companions, find_companions, output_name
from deltaspec.io.file_formats import is_pickled
from deltaspec.io.quantisation_config import FILES, METADATA
from deltaspec.io.sentence_modules import is_beside
from deltaspec.io.shards import INDEX, write_index
from deltaspec.io.weight_files import NUMBERED
from deltaspec.merging.apply import Loss
from deltaspec.types import Checkpoint, Entry, MatrixKey, Shape
from deltaspec.workflows.merging.merge_tensor import copy_tensor, merge_tensor
from deltaspec.workflows.merging.report import MergedMatrix
from deltaspec.workflows.merging.tensor_changes import TensorChanges
from deltaspec.workflows.shared.workers import Headway, OnStep

Files = dict[str, list[str]]
"""File of the result → the tensors that it holds."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What becomes of a base: its changes, and the dtype of every float tensor: bf16, fp16, fp32 or auto."""

    base: Checkpoint
    changes: TensorChanges
    dtype: str

    def entry(self, name: str, rows: list[MergedMatrix] | None = None) -> Entry:
        """Say how one tensor of the result is stored, and how to get it; ``rows`` takes what reading it finds."""
        change, stored = self.changes.tensors.get(name), _stored_name(self.base, name)
        spec = change.spec if change else self.base.tensors.get(name) or self.changes.added[name]
        cast = self.dtype != "auto" and spec.dtype in GRIDS
        dtype = OPTIONS[self.dtype].name if cast else spec.dtype
        if change is None:
            return Entry(stored, spec.shape, dtype, partial(copy_tensor, spec, DTYPES[dtype].torch if cast else None))

        def found(key: MatrixKey, shape: Shape, loss: Loss) -> None:
            if rows is not None:
                rows.append(MergedMatrix(key, shape, dtype, loss))

        return Entry(stored, change.shape, dtype, partial(merge_tensor, change, dtype=DTYPES[dtype].torch, found=found))


def _stored_name(base: Checkpoint, name: str) -> str:
    """Return the name that a tensor of the result has in the files; a new one is wrapped as all others are."""
    if name in base.tensors or name in base.aliases:
        return base.wrapped.get(name, name)
    around = {stored.removesuffix(bare) for bare, stored in base.wrapped.items() if stored.endswith(bare)}
    everywhere = len(base.wrapped) >= len(base.tensors)
    return min(around, key=len) + name if around and everywhere else name


def assign_files(rewrite: Rewrite, out: Path) -> Files:
    """Say which file of the result holds what: the base's own files, new tensors in the last of them.

    Raises
    ------
    OptionError
        If ``out`` is a file and the base has several.
    """
    base, files = rewrite.base, Files()
    for file in base.files:
        name = output_name(file.relative_to(base.root).as_posix())
        held = [tensor for tensor, spec in base.tensors.items() if spec.file == file and not is_beside(tensor, base)]
        if held:
            files.setdefault(name, []).extend(held)
    changes = rewrite.changes
    new = [*changes.added, *(tensor for tensor in changes.tensors if tensor not in base.tensors)]
    files[next(reversed(files))].extend(new)
    if out.suffix == ".safetensors":
        if len(files) > 1:
            message = f"Cannot write '{out}': the base has {len(files)} files; name a folder instead."
            raise OptionError(message)
        files = {out.name: next(iter(files.values()))}
    return files


def write_files(
    rewrite: Rewrite, files: Files, folder: Path, reports: Path, *, progress: OnStep | None
) -> tuple[MergedMatrix, ...]:
    """Write the files that are not finished yet; return every changed matrix.

    Parameters
    ----------
    rewrite : Rewrite
    files : dict
        From ``assign_files``.
    folder : Path
    reports : Path
        A folder that keeps each file's rows: what tells that it is finished.
    progress : callable, optional
        Called with a Step before the first tensor and after each.
    """
    kept = {name: reports / f"{number}.json" for number, name in enumerate(files)}
    finished = {name: _read_rows(kept[name], folder / name) for name in files}
    todo = [rewrite.entry(tensor) for name, held in files.items() if finished[name] is None for tensor in held]
    headway = Headway(len(todo), sum(math.prod(entry.shape) for entry in todo), progress)
    headway.tell()
    for name, held in files.items():
        if finished[name] is None:
            rows: list[MergedMatrix] = []
            entries = [_counted(rewrite.entry(tensor, rows), headway) for tensor in held]
            size = write_safetensors(folder / name, entries, metadata=_metadata(rewrite, held))
            with whole_file(kept[name]) as stream:
                stream.write(json.dumps({"bytes": size, "rows": [row.to_dict() for row in rows]}).encode())
            finished[name] = rows
    return tuple(row for rows in finished.values() for row in rows or ())


def _counted(entry: Entry, headway: Headway) -> Entry:
    """Count a tensor as done once it is read."""

    def read() -> Tensor:
        tensor = entry.read()
        headway.add(work=math.prod(entry.shape))
        return tensor

    return replace(entry, read=read)


def _metadata(rewrite: Rewrite, held: list[str]) -> dict[str, str]:
    """Keep what the header of the base's file says and is still true, and which names share a tensor."""
    base = rewrite.base
    file, names = base.tensors[held[0]].file, {*held}
    stored = None if is_pickled(file) else read_header(file)[1].get("__metadata__")
    aliases = {alias: name for alias, name in base.aliases.items() if name in names}
    shared = {_stored_name(base, alias): _stored_name(base, name) for alias, name in aliases.items()}
    kept = {key: text for key, text in (stored or SAVED).items() if rewrite.dtype == "auto" or key != METADATA}
    return {**(kept or SAVED), **shared}


def _read_rows(report: Path, written: Path) -> list[MergedMatrix] | None:
    """Return the rows of a finished file; None where it is to be written."""
    try:
        found = json.loads(report.read_bytes())
        rows = [MergedMatrix.from_dict(row) for row in found["rows"]]
        return rows if written.stat().st_size == found["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_beside(rewrite: Rewrite, files: Files, folder: Path) -> str:
    """Write the index, the config as it fits now, and the base's other files; return why some may be missing."""
    first, base, changes = next(iter(files)), rewrite.base, rewrite.changes
    if len(files) > 1 or NUMBERED.fullmatch(first):
        diffusion = "diffusion_pytorch_model"
        index = INDEX.replace("model", diffusion) if first.startswith(diffusion) else INDEX
        write_index(folder / index, {name: [rewrite.entry(tensor) for tensor in held] for name, held in files.items()})
    config = adjust_config(base.config, dtype=rewrite.dtype, vocabulary=changes.vocabulary, untied=changes.untied)
    companions, note = find_companions(base)
    kept = [path for path in companions if rewrite.dtype == "auto" or path.name not in FILES]
    copy_companions(kept, folder, root=base.root, config=config)
    return note
