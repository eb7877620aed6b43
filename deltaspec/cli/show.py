"""``deltaspec show``."""

from __future__ import annotations

import sys

import click

from deltaspec.cli.table import render, render_steps


@click.command()
@click.argument("run", type=click.Path())
@click.option("--by", type=click.Choice(["role", "depth", "matrix"]), default="role", show_default=True)
def show(run: str, by: str) -> None:
    """Print the table of RUN, a folder that analyze wrote; exit code 1 if some matrix or checkpoint in it failed."""
    from deltaspec.store.trajectory import Trajectory, load_results

    loaded = load_results(run)
    if isinstance(loaded, Trajectory):
        click.echo(render_steps(loaded, by))
        sys.exit(1 if loaded.failures or any(run.failures for run in loaded.runs) else 0)
    click.echo(render(loaded, by))
    sys.exit(1 if loaded.failures else 0)
