"""Columns of a file or a hub data set, whole, through the datasets library; code that comes with data never runs."""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError, OptionError, require
from deltaspec.io import hub
from deltaspec.io.text_rows import ENCODING, is_tabbed, separate

KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:((?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?", re.ASCII)


def read_rows(ref: str, fields: Sequence[str]) -> Any:
    """Read columns by name; where a csv or tsv file is asked for numbers alone, it has no line of names.

    Parameters
    ----------
    ref : str
        A path that ends in one of KINDS; else ``owner/name``, ``owner/name:split`` or ``owner/name:config/split`` of
        the hub; the split is train unless said.
    fields : sequence of str
        Columns that must be there.

    Returns
    -------
    datasets.Dataset
        These columns. Those of csv and tsv are strings as they stand in the file.

    Raises
    ------
    CheckpointError
        If it cannot be read, has no rows, or lacks a column.
    MissingPackageError
        If datasets is not installed.
    """
    path = Path(ref)
    with _quiet_datasets() as datasets:
        if path.exists():
            found = _read_file(datasets, path, fields)
        elif (match := ID.fullmatch(ref)) and path.suffix.lower() not in KINDS:
            found = _read_hub(datasets, match)
        else:
            message = f"Cannot read the data '{ref}': there is no such file, and it is not a hub id such as owner/name."
            raise CheckpointError(message)
    if not len(found):
        message = f"Cannot train on '{ref}': it has no rows; check that it is the right file."
        raise CheckpointError(message)
    for field in fields:
        if field not in found.column_names:
            there = ", ".join(map(str, found.column_names))[:300]
            message = f"'{ref}' has no column '{field}', it has {there}: pass --text or --label with one of these."
            raise CheckpointError(message)
    return found.select_columns(list(dict.fromkeys(fields)))


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """Give the datasets package, its log and progress bars silent meanwhile."""
    datasets = require("datasets", extra="train")
    log, level = datasets.logging, datasets.logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        log.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _read_file(datasets: Any, path: Path, fields: Sequence[str]) -> Any:
    kind = KINDS.get(path.suffix.lower())
    if kind is None or not path.is_file():
        message = f"Cannot read the data '{path}': expected a file that ends in {', '.join(KINDS)}."
        raise CheckpointError(message)
    settings: dict[str, Any] = {}
    if kind != "parquet":
        _check_text(path)
        settings = {"encoding": ENCODING} if kind != "json" else {}
    if kind == "csv":
        settings |= _describe_csv(datasets, path, fields)
    with tempfile.TemporaryDirectory() as folder:  # its cache goes by path and time, and a file may change in between
        try:
            builder = datasets.load_dataset_builder(kind, data_files=[str(path)], cache_dir=folder, **settings)
            builder.download_and_prepare()
            rows = builder.info.splits.total_num_examples
            return builder.as_dataset(split="train", in_memory=True) if rows else datasets.Dataset.from_dict({})
        except Exception as cause:  # every format's reader raises its own
            message = f"Cannot read the data '{path}' ({_explain(cause)}): repair the file."
            raise CheckpointError(message) from cause


def _check_text(path: Path) -> None:
    """Refuse what is empty or not UTF-8, with its line."""
    empty = True
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            empty = empty and not line.strip()
            try:
                line.decode()
            except UnicodeDecodeError as cause:
                message = f"Line {number} of '{path}' is not UTF-8 ({cause.reason}): convert the file to UTF-8."
                raise CheckpointError(message) from cause
    if empty:
        message = f"Cannot train on '{path}': it is empty; check that it is the right file."
        raise CheckpointError(message)


def _describe_csv(datasets: Any, path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """Say how to read separated values: every column a string; quotes are text where tabs separate."""
    numbered = [field.isdecimal() for field in fields]
    if any(numbered) and not all(numbered):
        message = f"--text and --label give '{path}' names and numbers: pass names, or numbers if it has no names."
        raise OptionError(message)
    tabs, first = is_tabbed(path), _check_width(path)
    names = [str(place) for place in range(1, len(first) + 1)] if all(numbered) else first
    return {
        "sep": "\t" if tabs else ",",
        "quoting": csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        "column_names": names,
        "header": None if all(numbered) else 0,
        "features": datasets.Features({name: datasets.Value("string") for name in names}),
        "keep_default_na": False,
    }


def _check_width(path: Path) -> list[str]:
    """Return the first row; all others must have as many columns, which the library fills up or shifts."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding=ENCODING, newline="") as stream:
            rows, first = separate(stream, path), list[str]()
            for row in filter(None, rows):
                first = first or row
                if len(row) != len(first):
                    message = (
                        f"Line {rows.line_num} of '{path}' has {len(row)} columns, and the first has {len(first)}: "
                        "repair the file, or quote texts that hold a comma."
                    )
                    raise CheckpointError(message)
    except csv.Error as cause:
        message = f"Cannot read the data '{path}' ({cause}): repair the file."
        raise CheckpointError(message) from cause
    finally:
        csv.field_size_limit(limit)
    return first


def _read_hub(datasets: Any, match: re.Match[str]) -> Any:
    """Read one split, from the cache where the hub cannot be asked."""
    repo, config, split = match["repo"], match["config"], match["split"] or "train"
    offline, reason = datasets.config.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set"
    try:
        if not offline:
            try:
                hub.ask(lambda api, patience: api.dataset_info(repo, timeout=patience))
            except Exception as cause:  # every version of the library raises its own network errors
                datasets.config.HF_HUB_OFFLINE, reason = True, hub.explain(cause)
        return datasets.load_dataset(repo, config, split=split)
    except Exception as cause:
        said = reason if datasets.config.HF_HUB_OFFLINE else _explain(cause)
        message = f"Cannot read the data '{match.string}': no such file here, and as a data set of the hub: {said}."
        raise CheckpointError(message) from cause
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _explain(cause: BaseException) -> str:
    """Return the innermost reason of a library's error, as one line."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(cause).split())[:300].rstrip(".") or type(cause).__name__
