"""``deltaspec extract``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from deltaspec.cli.choices import form_options, parse_form, parse_ranks, rank_options
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options import AnalyzeOptions, ExtractOptions


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--out", type=click.Path(), help="Adapter's folder; by default one under ./adapters.")
@rank_options("rank", "energy", "error", "params", "size", "above_rounding")
@click.option("--weighted", is_flag=True, help="Budgets: spend on ‖ΔW‖²/‖W‖² instead of ‖ΔW‖².")
@click.option("--run", default="", metavar="RUN", help="Budgets: take spectra from this run of analyze.")
@click.option("--calibration", default="", metavar="MOMENTS", help="Minimise the error that these inputs see.")
@form_options(extras=True)
@click.option("--include", default="", metavar="REGEX", help="Only tensors whose name this finds.")
@click.option("--exclude", default="", metavar="REGEX", help="No tensors whose name this finds.")
@click.option("--vocab", default="strict", show_default=True, help="strict, or common: only rows that both have.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or a list: cuda:0,cuda:1.")
@click.option("--workers", default=0, help="Matrices in flight on the CPU; 0: one for each core.")
@click.option("--memory", default=0, metavar="BYTES", help="Memory in flight; 0: twice the largest matrix's need.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def extract(base: str, tuned: str, out: str | None, as_json: bool, quiet: bool, overwrite: bool, **given: Any) -> None:
    """Turn the full fine-tune TUNED of BASE into a LoRA adapter, and say how good it is.

    Without a policy: --rank 16. Several amounts write several adapters into OUT.

    Exit code 1 if it was stopped (the same command goes on), 2 if nothing could be written.
    """
    ranks, form = parse_ranks(given, fallback="16"), parse_form(given)
    calibration, run = given.pop("calibration"), given.pop("run")
    options = ExtractOptions(ranks, form, AnalyzeOptions(**given), calibration, run)
    from deltaspec.cli.certificate import render_reports
    from deltaspec.workflows.extraction.extract import default_folder
    from deltaspec.workflows.extraction.extract import extract as run_extraction

    place = Path(out) if out else default_folder(tuned, options)
    with stoppable(), Progress(quiet=quiet) as progress:
        reports = run_extraction(base, tuned, place, options=options, overwrite=overwrite, progress=progress)
    click.echo(json.dumps(reports, ensure_ascii=False) if as_json else render_reports(reports))
    if not as_json:
        click.echo(f"\nAdapter: {place}")
