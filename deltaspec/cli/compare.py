"""``deltaspec compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from deltaspec.cli.flags import Output, flags, take
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options.compare import CompareOptions


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="OUT…")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for table, figures and spectra.")
@flags(CompareOptions)
@click.option("--format", "formats", default="pdf,png", show_default=True, help="Of figures: pdf, svg, png.")
@click.option("--style", default="neurips", show_default=True, help="neurips, icml, acl or slides.")
@flags(Output)
def compare(folders: tuple[str, ...], out: Path | None, formats: str, style: str, **given: Any) -> None:
    """Put the trainings OUT… of one base side by side: what each learned, forgot, cost and changed."""
    options, output = take(CompareOptions, given), take(Output, given)
    from deltaspec.cli.compare_table import render_comparison
    from deltaspec.plots.style import find_venue
    from deltaspec.workflows.analysis.write_figures import check_formats
    from deltaspec.workflows.comparison.compare import compare as run_comparison
    from deltaspec.workflows.comparison.compare import draw_comparison

    check_formats(formats.split(","))  # before the long work
    find_venue(style)
    with stoppable(), Progress(quiet=output.quiet) as progress:
        rows = run_comparison(folders, out, options=options, progress=progress)
        figures = draw_comparison(rows, out, formats=formats.split(","), style=style)
    if output.as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    click.echo(render_comparison(rows))
    for path in figures:
        click.echo(f"Figure: {path}")
