"""Verdicts as a table, by architecture and in total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    *("analyze", "none", "all", "verify none", "verify all", "merge all-linear", "merge leaves", "merge experts"),
)
SHORT = {"right": "right", "refused": "refused", "WRONG": "WRONG", "skipped": "-"}


def print_row(row: dict[str, Any]) -> None:
    """Print one architecture: its verdicts, then a line for each reason."""
    verdicts = row["verdicts"]
    kind, reason = verdicts["build"]
    if len(verdicts) == 1:
        print(f"{row['name']:34} {kind}: {reason[:200]}", flush=True)
        return
    cells = " ".join(f"{SHORT.get(verdicts[column][0], verdicts[column][0]):8}" for column in COLUMNS)
    print(f"{row['name']:34} {cells} {row['seconds']:5} s{'' if not reason else '  ' + reason}", flush=True)
    for column in COLUMNS:
        kind, reason = verdicts[column]
        if reason and kind in ("WRONG", "refused"):
            print(f"    {column}: {kind}: {reason[:400]}", flush=True)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print all, then the totals."""
    print("\nextract --extras none, all; verify of both; merge of adapters for all linear layers, some leaves, experts")
    heads = ("analyze", "none", "all", "v none", "v all", "m linear", "m leaves", "m expert")
    print(f"{'':34} " + " ".join(f"{head:8}" for head in heads))
    for row in rows:
        print_row(row)
    print(f"\n{'check':18} right refused WRONG    -")
    for column in COLUMNS:
        counts = Counter(row["verdicts"][column][0] for row in rows if column in row["verdicts"])
        print(f"{column:18} {counts['right']:5} {counts['refused']:7} {counts['WRONG']:5} {counts['skipped']:4}")
    totals = Counter(sum_up(row) for row in rows)
    little = [row["name"] for row in rows if sum_up(row) == "right" and "carries" in row["verdicts"]["all"][1]]
    if little:
        print(f"\nRight, and with all extras little carried ({len(little)}): {', '.join(little)}")
    built = sum(totals[kind] for kind in ("right", "refused", "WRONG"))
    print(f"\n{len(rows)} architectures: " + ", ".join(f"{count} {kind}" for kind, count in totals.most_common()) + ".")
    print(f"Of {built} that were built, {totals['right'] / max(built, 1):.1%} are right.")


def sum_up(row: dict[str, Any]) -> str:
    """Name what an architecture is as a whole: as bad as its worst check.

    It is refused where analyze or extract are, or every merge is; that one adapter of several is refused, because what
    it targets has no effect as PEFT runs it, is no fault of the architecture.
    """
    kinds = {check: kind for check, (kind, _) in row["verdicts"].items()}
    for kind in ("broken", "not built", "WRONG"):
        if kind in kinds.values():
            return kind
    merges = {kind for check, kind in kinds.items() if check.startswith("merge")}
    needed = {kinds[check] for check in ("analyze", "none", "all")}
    return "refused" if "refused" in needed or ("refused" in merges and "right" not in merges) else "right"
