"""The files of a checkpoint, written again with some of its tensors changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaspec.errors import OptionError
from deltaspec.files.atomic import whole_file
from deltaspec.files.dtypes import DTYPES, GRIDS, OPTIONS
from deltaspec.files.tensor_reader import read_header
from deltaspec.files.tensor_writer import SAVED, write_safetensors
from deltaspec.io.companions import adjust_config, copy_companions, find_companions, output_name
from deltaspec.io.shards import INDEX, NUMBERED, write_index
from deltaspec.merging.apply import Loss
from deltaspec.types import Checkpoint, Entry, MatrixKey, Shape, Step
from deltaspec.workflows.merging.merge_tensor import Found, copy_tensor, merge_tensor
from deltaspec.workflows.merging.tensor_changes import Changes

Files = dict[str, list[str]]


class Rewrite:
    """What becomes of a base, and how far its writing is; ``dtype`` is bf16, fp16, fp32 or auto."""

    def __init__(self, base: Checkpoint, changes: Changes, dtype: str, progress: Callable[[Step], None] | None) -> None:
        self.base, self.changes, self.dtype, self.progress = base, changes, dtype, progress
        self.total = self.done = self.weights = self.all_weights = 0

    def layout(self, out: Path) -> Files:
        """Say which file of the result holds what: the base's own files, new tensors in the last of them."""
        files: Files = {}
        for file in self.base.files:
            name = output_name(file.relative_to(self.base.root).as_posix())
            if held := [tensor for tensor, spec in self.base.tensors.items() if spec.file == file]:
                files.setdefault(name, []).extend(held)
        new = [*self.changes.added, *(tensor for tensor in self.changes.tensors if tensor not in self.base.tensors)]
        files[next(reversed(files))].extend(new)
        if out.suffix == ".safetensors":
            if len(files) > 1:
                message = f"Cannot write '{out}': the base has {len(files)} files; name a folder instead."
                raise OptionError(message)
            files = {out.name: next(iter(files.values()))}
        return files

    def write(self, files: Files, folder: Path, reports: Path) -> list[dict[str, Any]]:
        """Write the files that are not finished yet; return the rows of every changed matrix.

        Parameters
        ----------
        files : dict
            From ``layout``.
        folder : Path
        reports : Path
            A folder that keeps each file's rows: what tells that it is finished.
        """
        kept = [reports / f"{number}.json" for number in range(len(files))]
        finished = {name: _read_rows(report, folder / name) for name, report in zip(files, kept, strict=True)}
        todo = [self._entry(tensor, []) for name, held in files.items() if finished[name] is None for tensor in held]
        self.total, self.all_weights = len(todo), sum(math.prod(entry.shape) for entry in todo)
        self._report(0, 0)
        for (name, held), report in zip(files.items(), kept, strict=True):
            if finished[name] is None:
                rows: list[dict[str, Any]] = []
                entries = [self._entry(tensor, rows) for tensor in held]
                size = write_safetensors(folder / name, entries, metadata=self._metadata(held))
                with whole_file(report) as stream:
                    stream.write(json.dumps({"bytes": size, "rows": rows}).encode())
                finished[name] = rows
        return [row for rows in finished.values() for row in rows or ()]

    def write_beside(self, files: Files, folder: Path) -> str:
        """Write the index, the config as it fits now, and the base's other files; return why some may be missing."""
        first = next(iter(files))
        if len(files) > 1 or NUMBERED.fullmatch(first):
            diffusion = "diffusion_pytorch_model"
            index = INDEX.replace("model", diffusion) if first.startswith(diffusion) else INDEX
            write_index(
                folder / index, {name: [self._entry(tensor, []) for tensor in held] for name, held in files.items()}
            )
        config = adjust_config(
            self.base.config,
            dtype=self.dtype,
            vocabulary=self.changes.vocabulary,
            untied=self.changes.untied,
        )
        companions, note = find_companions(self.base)
        copy_companions(companions, folder, config=config)
        return note

    def _entry(self, name: str, rows: list[dict[str, Any]]) -> Entry:
        """Say how one tensor of the result is stored, and how to get it."""
        change = self.changes.tensors.get(name)
        spec = change.spec if change else self.base.tensors.get(name) or self.changes.added[name]
        cast = self.dtype != "auto" and spec.dtype in GRIDS
        dtype = OPTIONS[self.dtype].name if cast else spec.dtype
        if change is None:
            read = partial(copy_tensor, spec, DTYPES[dtype].torch if cast else None)
        else:
            read = partial(merge_tensor, change, dtype=DTYPES[dtype].torch, found=_collector(rows, dtype))
        shape = spec.shape if change is None else change.shape

        def read_and_report() -> Tensor:
            tensor: Tensor = read()
            self._report(1, math.prod(shape))
            return tensor

        return Entry(name, shape, dtype, read_and_report)

    def _metadata(self, held: list[str]) -> dict[str, str]:
        """Keep what the header of the base's file says, and which names share a tensor."""
        file, names = self.base.tensors[held[0]].file, {*held}
        stored = read_header(file)[1].get("__metadata__") if file.name.endswith(".safetensors") else None
        shared = {alias: name for alias, name in self.base.aliases.items() if name in names}
        return {**(stored or SAVED), **shared}

    def _report(self, tensors: int, weights: int) -> None:
        self.done, self.weights = self.done + tensors, self.weights + weights
        if self.progress:
            self.progress(Step(self.done, self.total, 0, self.weights, self.all_weights, self.weights))


def _collector(rows: list[dict[str, Any]], dtype: str) -> Found:
    """Return a function that keeps each matrix's loss as plain data."""

    def found(key: MatrixKey, shape: Shape, loss: Loss) -> None:
        rows.append({**asdict(key), "shape": list(shape), "dtype": dtype, **asdict(loss)})

    return found


def _read_rows(report: Path, written: Path) -> list[dict[str, Any]] | None:
    """Return the rows of a finished file; None where it is to be written."""
    try:
        found = json.loads(report.read_bytes())
        rows: list[dict[str, Any]] = found["rows"]
        return rows if written.stat().st_size == found["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None
