"""A run or trajectory → one flat table for other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

from deltaspec.errors import require
from deltaspec.store.run import Run
from deltaspec.store.trajectory import Trajectory


def to_csv(run: Run | Trajectory) -> bytes:
    """Comma-separated, one line for each record; empty where a metric does not apply."""
    rows = run.to_dicts()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["tensor"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_json(run: Run | Trajectory) -> bytes:
    """Render a JSON list of records."""
    return (json.dumps(run.to_dicts(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_parquet(run: Run | Trajectory) -> bytes:
    """Render Parquet (needs pyarrow), one row for each record."""
    arrow = require("pyarrow", extra="parquet")
    parquet = require("pyarrow.parquet", extra="parquet")
    sink = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(run.to_dicts()), sink)
    return sink.getvalue()


FORMATS: dict[str, Callable[[Run | Trajectory], bytes]] = {"csv": to_csv, "json": to_json, "parquet": to_parquet}
