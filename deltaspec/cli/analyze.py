"""``deltaspec analyze``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from deltaspec.cli.flags import Output, flags, take
from deltaspec.cli.one_sided import stop_if_partial
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.cli.table import render, render_plan
from deltaspec.options import AnalyzeOptions, PairOptions


@click.command()
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True)
@click.option(
    "-o", "--out", type=click.Path(), help="Run directory; by default one under ./runs. An unfinished run goes on."
)
@flags(AnalyzeOptions)
@flags(PairOptions)
@click.option("--dry-run", is_flag=True, help="Print what would be compared; read no weights.")
@flags(Output)
def analyze(base: str, tuned: tuple[str, ...], out: str | None, dry_run: bool, **given: Any) -> None:
    """Decompose the change from BASE to TUNED and print how many directions it uses.

    BASE and TUNED are folders, files, or hub ids (owner/name@revision); TUNED, or both, may be a PEFT adapter. Several
    checkpoints of one training, or its folder, give a run for each step.

    Exit code 1 if a matrix or checkpoint failed, or blocks have no counterpart; 2 if nothing could be compared.
    """
    given |= {"pairing": take(PairOptions, given)}
    options, output = take(AnalyzeOptions, given), take(Output, given)
    from deltaspec.workflows.analysis.training_steps import is_training

    if len(tuned) > 1 or is_training(tuned[0]):
        from deltaspec.cli.steps import analyze_steps, show_steps

        if dry_run:
            show_steps(base, tuned, options, as_json=output.as_json)
        else:
            analyze_steps(base, tuned, out, options=options, output=output)
        return
    from deltaspec.workflows.analysis.analyze import analyze as run_analysis
    from deltaspec.workflows.analysis.analyze import plan_analysis
    from deltaspec.workflows.analysis.as_json import plan_to_json, run_to_json
    from deltaspec.workflows.shared.opened_base import Base

    if dry_run:
        plan = plan_analysis(Base(base), tuned[0], options)
        click.echo(json.dumps(plan_to_json(plan)) if output.as_json else render_plan(plan))
        return
    with stoppable(), Progress(quiet=output.quiet) as progress:
        run = run_analysis(base, tuned[0], out, options=options, progress=progress)
    click.echo(json.dumps(run_to_json(run), ensure_ascii=False) if output.as_json else render(run))
    if not output.as_json:
        click.echo(f"\nRun: {run.path}  (deltaspec show, export, plot)")
    if run.failures:
        click.echo(f"Failed: {len(run.failures)} of the tensors; the others are stored in {run.path}.", err=True)
        sys.exit(1)
    stop_if_partial(run.one_sided, meant=options.pairing.partial)
