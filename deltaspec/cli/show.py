"""``deltaspec show``."""

from __future__ import annotations

import sys

import click

from deltaspec.cli.table import render


@click.command()
@click.argument("run", type=click.Path())
@click.option("--by", type=click.Choice(["role", "depth", "matrix"]), default="role", show_default=True)
def show(run: str, by: str) -> None:
    """Print the table of RUN, a folder that analyze wrote; exit code 1 if some matrix in it failed."""
    from deltaspec.store.run import Run

    loaded = Run.load(run)
    click.echo(render(loaded, by))
    sys.exit(1 if loaded.failures else 0)
