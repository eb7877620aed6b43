"""Open, create, resume and read a run directory; its format is specified in format.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.errors import RunError, require
from deltaspec.files.atomic import is_leftover, write_whole
from deltaspec.store.formats.run import FailedRecord, Manifest, VectorRow
from deltaspec.store.identity import RUN, differences
from deltaspec.store.record import encode, file_stem, read_record, read_spectrum
from deltaspec.types import MatrixKey, MatrixRecord, OneSidedBlocks, SkippedTensor, Spectrum

if TYPE_CHECKING:
    import pandas

FORMAT, VERSION = "deltaspec-run", 1


class Run:
    """The results of one analysis, on disk; nothing of the checkpoints is needed to read it.

    Attributes
    ----------
    path : Path
    manifest : Manifest
        What was compared, with which options and versions; see format.md.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Open an existing run directory.

        Raises
        ------
        RunError
            If there is none, or a newer deltaspec wrote it.
        """
        folder = Path(path)
        file = folder / "manifest.json"
        try:
            manifest: Manifest = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as cause:
            message = f"{folder} holds no manifest.json: expected a run directory written by deltaspec analyze."
            raise RunError(message) from cause
        except (OSError, ValueError) as cause:
            message = f"{file} cannot be read ({cause}): delete {folder} and analyse again."
            raise RunError(message) from cause
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            message = f'{file} is not a deltaspec run: expected "format": "{FORMAT}".'
            raise RunError(message)
        if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
            message = (
                f"{file} has format version {manifest.get('version')}, this deltaspec reads up to {VERSION}: upgrade."
            )
            raise RunError(message)
        return cls(folder, manifest)

    @classmethod
    def create_or_resume(cls, path: str | Path, manifest: Mapping[str, object]) -> Run:
        """Start a run, or go on with the one at ``path`` if it compares the same files with the same options.

        Parameters
        ----------
        path : str or Path
        manifest : mapping
            What RunContent says.

        Raises
        ------
        RunError
            If the folder holds something else, cannot be written, or belongs to other checkpoints or options.
        """
        folder = Path(path)
        try:
            if not (folder / "manifest.json").exists():
                if folder.exists() and (not folder.is_dir() or not all(map(is_leftover, folder.iterdir()))):
                    message = f"{folder} exists and is not a run directory: pass another one with -o."
                    raise RunError(message)
                text = json.dumps({"format": FORMAT, "version": VERSION, **manifest}, indent=1)
                write_whole(folder / "manifest.json", text.encode(), refusal=_unwritable)
                return cls.load(folder)
            run = cls.load(folder)
            found = list(differences(run.manifest, json.loads(json.dumps(manifest)), RUN))
            if found:
                message = (
                    f"{folder} holds a run of something else ({'; '.join(found[:3])}): "
                    "pass another folder with -o, or delete this one."
                )
                raise RunError(message)
            for leftover in filter(is_leftover, folder.glob("**/*.tmp")):
                leftover.unlink(missing_ok=True)
        except OSError as cause:
            raise _unwritable(folder / "manifest.json", cause) from cause
        return run

    def _file(self, key: MatrixKey, store_key: str, suffix: str = ".safetensors") -> Path:
        depth = "none" if key.depth is None else str(key.depth)
        return self.path / "matrices" / depth / f"{file_stem(store_key)}{suffix}"

    def has(self, key: MatrixKey, store_key: str) -> bool:
        """Tell whether this record is done; a damaged one is removed, to be computed again."""
        file = self._file(key, store_key)
        if not file.exists():
            return False
        try:
            read_record(file)
        except RunError:
            file.unlink()
            return False
        return True

    def put(self, record: MatrixRecord, spectrum: Spectrum) -> None:
        """Store a result by atomic rename; an earlier failure of the same matrix goes."""
        self._write(self._file(record.key, record.store_key), encode(record, spectrum))
        self.drop_failure(record.key, record.store_key)

    def adopt(self, other: Run, records: Sequence[tuple[MatrixKey, str]]) -> None:
        """Copy those of these records that this run lacks and the other has; they must be of the same matrix."""
        for key, store_key in records:
            source, target = other._file(key, store_key), self._file(key, store_key)
            if source.exists() and not target.exists():
                self._write(target, source.read_bytes())

    def put_failure(self, key: MatrixKey, store_key: str, message: str) -> None:
        """Store why a matrix has no result; it is tried again on resume."""
        failed: FailedRecord = {"key": store_key, "message": message}
        content = json.dumps(failed, indent=1)
        self._write(self._file(key, store_key, ".failed.json"), content.encode())

    def drop_failure(self, key: MatrixKey, store_key: str) -> None:
        """Forget that a matrix or vector failed, if it did."""
        self._file(key, store_key, ".failed.json").unlink(missing_ok=True)

    def put_vectors(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Store the relative changes of norms and biases."""
        self._write(self.path / "vectors.json", json.dumps(list(rows), indent=1).encode())

    def _write(self, file: Path, content: bytes) -> None:
        """Store one of many small files; a damaged one is computed again."""
        write_whole(file, content, durable=False, refusal=lambda _, cause: unwritable(self.path, cause))

    @cached_property
    def records(self) -> list[MatrixRecord]:
        """Every finished matrix, in the order of the plan."""
        order = {key: i for i, key in enumerate(self.manifest.get("planned", ()))}
        records = [read_record(path) for path in sorted(self.path.glob("matrices/*/*.safetensors"))]
        return sorted(records, key=lambda record: order.get(record.store_key, len(order)))

    @cached_property
    def _by_key(self) -> dict[str, MatrixRecord]:
        return {record.store_key: record for record in self.records}

    @cached_property
    def failures(self) -> dict[str, str]:
        """Matrices without a result: key → the sentence that says why."""
        rows: list[FailedRecord] = [_read_json(path) for path in sorted(self.path.glob("matrices/*/*.failed.json"))]
        return {row["key"]: row["message"] for row in rows}

    @cached_property
    def vectors(self) -> list[VectorRow]:
        """Norms and biases."""
        file = self.path / "vectors.json"
        rows: list[VectorRow] = _read_json(file) if file.exists() else []
        return rows

    @property
    def skipped(self) -> list[SkippedTensor]:
        """Tensors that were not compared, each with its reason."""
        return self.manifest.get("skipped", [])

    @property
    def one_sided(self) -> list[OneSidedBlocks]:
        """Blocks that only one of the two sides has."""
        return self.manifest.get("one_sided", [])

    @property
    def missing(self) -> list[str]:
        """Planned matrices that have neither a result nor a failure yet: the run was stopped."""
        done = {record.store_key for record in self.records} | set(self.failures)
        return [key for key in self.manifest.get("planned", ()) if key not in done]

    def spectrum(self, key: str) -> Spectrum:
        """Read the singular values of one matrix.

        Parameters
        ----------
        key : str
            As ``record.store_key``: the tensor's name, its part and expert where it has them, #base or #tuned.

        Raises
        ------
        RunError
            If no record has this key.
        """
        record = self._by_key.get(key)
        if record is None:
            message = f"{self.path} has no record '{key}': run.records lists {len(self.records)} keys (store_key)."
            raise RunError(message)
        return read_spectrum(self._file(record.key, key))

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict for each record: key fields, shape, dtypes, spectrum_of, metrics, method, error bound."""
        return [record.to_dict() for record in self.records]

    def to_pandas(self) -> pandas.DataFrame:
        """Return the same as a DataFrame (pandas is optional)."""
        frame: pandas.DataFrame = require("pandas", extra="pandas").DataFrame(self.to_dicts())
        return frame


def unwritable(folder: Path, cause: OSError) -> RunError:
    """Return the error for a run directory that can no longer be written to."""
    message = f"The run directory {folder} cannot be written ({cause.strerror}): free space or rights, then run again."
    return RunError(message)


def _unwritable(manifest: Path, cause: OSError) -> RunError:
    message = f"The run directory {manifest.parent} cannot be written ({cause.strerror}): pass another one with -o."
    return RunError(message)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        message = f"{path} cannot be read ({cause}): delete it and run the same analyze command again."
        raise RunError(message) from cause
