"""``deltaspec merge``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from deltaspec.cli.flags import Writing, flags, take
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.cli.table import printable, table
from deltaspec.options import MergeOptions, PairOptions

if TYPE_CHECKING:
    from deltaspec.workflows.merging.report import MergeReport

LEGEND = """loss: ‖(W' - W) - ΔW‖ / ‖ΔW‖, what rounding W' took from the update (median and worst matrix of a role);
unchanged: elements that are what they were."""


@click.command()
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--out", type=click.Path(), required=True, help="Folder, or .safetensors file, to write.")
@flags(MergeOptions)
@flags(PairOptions, "map", "component")
@flags(Writing)
def merge(base: str, adapters: tuple[str, ...], out: str, **given: Any) -> None:
    """Add LoRA adapters to BASE, each times its weight (1), and say how much of the update rounding lost.

    Exit code 1 if it was stopped (the same command goes on), 2 if nothing could be written.
    """
    given |= {"pairing": take(PairOptions, given)}
    options, writing = take(MergeOptions, given), take(Writing, given)
    from deltaspec.workflows.merging.merge import merge as run_merge

    with stoppable(), Progress(quiet=writing.quiet) as progress:
        report = run_merge(base, adapters, out, options=options, overwrite=writing.overwrite, progress=progress)
    click.echo(json.dumps(report.to_dict(), ensure_ascii=False) if writing.as_json else _render(report))


def _render(report: MergeReport) -> str:
    """Lay out a table by role, the total, what was assumed, and where the result is."""
    total = report.loss
    rows = [
        *report.by_role(),
        {
            "role": "total",
            "matrices": len(report.rows),
            "median_loss": total.relative,
            "worst_loss": None,
            "unchanged": total.unchanged_share,
        },
    ]
    shown = [
        {**row, **{name: _percent(row[name]) for name in ("median_loss", "worst_loss", "unchanged")}} for row in rows
    ]
    notes = [printable(f"Note: {note}.") for note in report.notes[:5]]
    if len(report.notes) > 5:
        notes.append(f"Note: {len(report.notes) - 5} more notes in {report.path / 'deltaspec.json'}.")
    return "\n\n".join(
        part for part in (table(shown), LEGEND, *notes, report.remark(), f"Merged: {report.path}") if part
    )


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:6.2f}%" if value < 10 else f"{value:6.0f}x"
