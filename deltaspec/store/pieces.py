"""Finished pieces of long work: one safetensors file each, so that killed work goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.errors import RunError
from deltaspec.files.atomic import write_whole
from deltaspec.store.record import file_stem, read_json_header

if TYPE_CHECKING:
    from torch import Tensor


class Pieces:
    """A folder of pieces by key; each is a row of plain data with some tensors.

    A piece that exists is whole, for it landed by a rename; a damaged one counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, key: str) -> Path:
        return self.folder / f"{file_stem(key)}.safetensors"

    def put(self, key: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Store one piece by atomic rename.

        Raises
        ------
        RunError
            If the folder cannot be written.
        """
        from safetensors.torch import save

        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        stored = bytes(save(content, metadata={"row": json.dumps(row)}))
        write_whole(self._file(key), stored, durable=False, refusal=self._unwritable)

    def _unwritable(self, _: Path, cause: OSError) -> RunError:
        message = (
            f"The folder {self.folder} cannot be written ({cause.strerror}): free space or rights, then run "
            "the same command again."
        )
        return RunError(message)

    def row(self, key: str) -> dict[str, Any] | None:
        """Return the plain data of a piece, or None where it is missing."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            return read_json_header(file, "row")
        except RunError:
            file.unlink()
            return None

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Read the tensors of a piece that is there."""
        from safetensors.torch import load_file

        return dict(load_file(self._file(key)))
