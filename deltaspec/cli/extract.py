"""``deltaspec extract``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from deltaspec.cli.choices import parse_ranks, rank_options
from deltaspec.cli.flags import Writing, flags, take
from deltaspec.cli.one_sided import stop_if_partial
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options import AnalyzeOptions, ExtractOptions, FormOptions, PairOptions, RankOptions


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--out", type=click.Path(), help="Adapter's folder; by default one under ./adapters.")
@rank_options(above_rounding=True)
@flags(RankOptions, "weighted")
@flags(ExtractOptions)
@flags(FormOptions)
@flags(AnalyzeOptions, "include", "exclude", "vocab", "device", "workers", "memory")
@flags(PairOptions)
@flags(Writing)
def extract(base: str, tuned: str, out: str | None, **given: Any) -> None:
    """Turn the full fine-tune TUNED of BASE into a LoRA adapter, and say how good it is.

    Without a policy: --rank 16. Several amounts write several adapters into OUT.

    Exit code 1 if it was stopped (the same command goes on), or blocks have no counterpart; 2 if nothing could be
    written.
    """
    given |= {"ranks": parse_ranks(given, fallback="16"), "form": take(FormOptions, given)}
    given |= {"pairing": take(PairOptions, given)}
    options = take(ExtractOptions, given | {"analysis": take(AnalyzeOptions, given)})
    writing = take(Writing, given)
    from deltaspec.cli.certificate import render_reports
    from deltaspec.workflows.extraction.extract import default_folder
    from deltaspec.workflows.extraction.extract import extract as run_extraction

    place = Path(out) if out else default_folder(tuned, options)
    with stoppable(), Progress(quiet=writing.quiet) as progress:
        reports = run_extraction(base, tuned, place, options=options, overwrite=writing.overwrite, progress=progress)
    click.echo(json.dumps(reports, ensure_ascii=False) if writing.as_json else render_reports(reports))
    if not writing.as_json:
        click.echo(f"\nAdapter: {place}")
    stop_if_partial(next(iter(reports.values())).get("one_sided", []), meant=options.analysis.pairing.partial)
