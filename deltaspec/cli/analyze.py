"""``deltaspec analyze``."""

from __future__ import annotations

import json
import sys
from dataclasses import fields

import click

from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.cli.table import render, render_plan
from deltaspec.options import AnalyzeOptions

DEFAULT = {field.name: field.default for field in fields(AnalyzeOptions)}


@click.command()
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True)
@click.option(
    "-o", "--out", type=click.Path(), help="Run directory; by default one under ./runs. An unfinished run goes on."
)
@click.option(
    "--device", default=DEFAULT["device"], show_default=True, help="auto, cpu, cuda, or a list: cuda:0,cuda:1."
)
@click.option("--include", default=DEFAULT["include"], metavar="REGEX", help="Only tensors whose name this finds.")
@click.option("--exclude", default=DEFAULT["exclude"], metavar="REGEX", help="No tensors whose name this finds.")
@click.option("--spectra", default="delta", show_default=True, help="Which to decompose: some of delta,base,tuned.")
@click.option(
    "--vectors", default=DEFAULT["vectors"], show_default=True, metavar="K", help="Keep the top K singular triplets."
)
@click.option("--exact", is_flag=True, help="QR and fp64 SVD: slower, exact for values below 1e-6 of the largest too.")
@click.option(
    "--vocab", default=DEFAULT["vocab"], show_default=True, help="strict, or common: only rows that both have."
)
@click.option("--workers", default=DEFAULT["workers"], help="Matrices in flight on the CPU; 0: one for each core.")
@click.option(
    "--memory", default=DEFAULT["memory"], metavar="BYTES", help="Memory in flight; 0: 4 × the largest matrix in fp64."
)
@click.option("--dry-run", is_flag=True, help="Print what would be compared, read no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
def analyze(
    base: str,
    tuned: tuple[str, ...],
    out: str | None,
    spectra: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: object,
) -> None:
    """Decompose the change from BASE to TUNED and print how many directions it uses.

    BASE and TUNED are folders, files, or hub ids (owner/name@revision); TUNED, or both, may be a PEFT adapter. Several
    checkpoints of one training, or its folder, give a run for each step.

    Exit code 1 if a matrix or checkpoint failed, 2 if nothing could be compared.
    """
    options = AnalyzeOptions(spectra=tuple(spectra.split(",")), **given)  # type: ignore[arg-type]
    from deltaspec.workflows.analysis.training_steps import is_training

    if len(tuned) > 1 or is_training(tuned[0]):
        from deltaspec.cli.steps import analyze_steps

        analyze_steps(base, tuned, out, options=options, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    from deltaspec.workflows.analysis.analyze import analyze as run_analysis
    from deltaspec.workflows.analysis.analyze import plan_analysis
    from deltaspec.workflows.analysis.as_json import plan_to_json, run_to_json
    from deltaspec.workflows.shared.opened_base import Base

    if dry_run:
        plan = plan_analysis(Base(base), tuned[0], options)
        click.echo(json.dumps(plan_to_json(plan)) if as_json else render_plan(plan))
        return
    with stoppable(), Progress(quiet=quiet) as progress:
        run = run_analysis(base, tuned[0], out, options=options, progress=progress)
    click.echo(json.dumps(run_to_json(run), ensure_ascii=False) if as_json else render(run))
    if not as_json:
        click.echo(f"\nRun: {run.path}  (deltaspec show, export, plot)")
    if run.failures:
        click.echo(f"Failed: {len(run.failures)} of the tensors; the others are stored in {run.path}.", err=True)
        sys.exit(1)
