"""``deltaspec compare``."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import click

from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options.compare import CompareOptions

DEFAULT = {field.name: field.default for field in fields(CompareOptions)}


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="OUT…")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for table, figures and spectra.")
@click.option("--directions", default=DEFAULT["directions"], show_default=True, help="Top directions of ΔW compared.")
@click.option("--intruders/--no-intruders", default=True, show_default=True, help="Count intruder dimensions.")
@click.option("--include", default=DEFAULT["include"], metavar="REGEX", help="Only tensors whose name this finds.")
@click.option("--exclude", default=DEFAULT["exclude"], metavar="REGEX", help="No tensors whose name this finds.")
@click.option("--device", default=DEFAULT["device"], show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--format", "formats", default="pdf,png", show_default=True, help="Of figures: pdf, svg, png.")
@click.option("--style", default="neurips", show_default=True, help="neurips, icml, acl or slides.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def compare(
    folders: tuple[str, ...],
    out: Path | None,
    formats: str,
    style: str,
    as_json: bool,
    quiet: bool,
    **given: object,
) -> None:
    """Put the trainings OUT… of one base side by side: what each learned, forgot, cost and changed."""
    options = CompareOptions(**given)  # type: ignore[arg-type]
    from deltaspec.cli.compare_table import render_comparison
    from deltaspec.plots.style import find_venue
    from deltaspec.workflows.analysis.write_figures import check_formats
    from deltaspec.workflows.comparison.compare import compare as run_comparison
    from deltaspec.workflows.comparison.compare import draw_comparison

    check_formats(formats.split(","))  # before the long work
    find_venue(style)
    with stoppable(), Progress(quiet=quiet) as progress:
        rows = run_comparison(folders, out, options=options, progress=progress)
        figures = draw_comparison(rows, out, formats=formats.split(","), style=style)
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    click.echo(render_comparison(rows))
    for path in figures:
        click.echo(f"Figure: {path}")
