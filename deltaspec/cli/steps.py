"""``deltaspec analyze`` of several checkpoints."""

from __future__ import annotations

import json
import sys

import click

from deltaspec.cli.flags import Output
from deltaspec.cli.one_sided import stop_if_partial
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.cli.table import render_steps, table
from deltaspec.options import AnalyzeOptions


def show_steps(base: str, checkpoints: tuple[str, ...], options: AnalyzeOptions, *, as_json: bool) -> None:
    """Print what would be compared at each step; no weights are read."""
    from deltaspec.workflows.analysis.trajectory import plan_steps

    rows = plan_steps(base, checkpoints, options)
    click.echo(json.dumps(rows) if as_json else table(rows))


def analyze_steps(
    base: str,
    checkpoints: tuple[str, ...],
    out: str | None,
    *,
    options: AnalyzeOptions,
    output: Output,
) -> None:
    """Analyse every checkpoint and print rank against training step; exit code 1 if some of it failed."""
    from deltaspec.workflows.analysis.as_json import trajectory_to_json
    from deltaspec.workflows.analysis.trajectory import trajectory

    with stoppable(), Progress(quiet=output.quiet) as progress:
        found = trajectory(base, checkpoints, out, options=options, progress=progress)
    click.echo(json.dumps(trajectory_to_json(found), ensure_ascii=False) if output.as_json else render_steps(found))
    if not output.as_json:
        click.echo(f"\nTrajectory: {found.path}  (deltaspec show, export, plot)")
    failed = len(found.failures) + sum(len(run.failures) for run in found.runs)
    if failed:
        click.echo(f"Failed: {failed} of the checkpoints or tensors; the others are stored in {found.path}.", err=True)
        sys.exit(1)
    longest = max((run.one_sided for run in found.runs), key=len, default=[])
    stop_if_partial(longest, meant=options.pairing.partial)
