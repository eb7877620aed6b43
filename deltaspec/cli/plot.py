"""``deltaspec plot``: draw a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the figures.  [default: RUN/figures]")
@click.option("--format", "formats", default="pdf,svg,png", show_default=True, help="Any of pdf, svg, png.")
@click.option(
    "--style",
    default="neurips",
    show_default=True,
    type=click.Choice(["neurips", "icml", "acl", "slides"]),
    help="Width and font size of the page that the figures go to.",
)
def plot(run: Path, output: Path | None, formats: str, style: str) -> None:
    """Draw the figures of RUN (a trajectory: rank by step), each beside the CSV that it draws, and print the paths."""
    from deltaspec.store.trajectory import load_results
    from deltaspec.workflows.analysis.write_figures import plot as draw

    names = tuple(name.strip() for name in formats.split(","))
    for path in draw(load_results(run), output, formats=names, style=style):
        click.echo(path)
