"""``deltaspec export``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path())
@click.option("--format", "kind", type=click.Choice(["csv", "json", "parquet"]), default="csv", show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write; stdout by default.")
def export(run: str, kind: str, out: Path | None) -> None:
    """Write the records of RUN, one row for each matrix, and step where it is a trajectory."""
    from deltaspec.errors import RunError
    from deltaspec.files.atomic import write_whole
    from deltaspec.store.trajectory import load_results
    from deltaspec.workflows.analysis.export import FORMATS

    content = FORMATS[kind](load_results(run))
    if out is None:
        click.echo(content, nl=False)
        return

    def refusal(_: Path, cause: OSError) -> RunError:
        return RunError(f"{out} cannot be written ({cause.strerror}): pass another file with -o.")

    write_whole(out, content, refusal=refusal)
