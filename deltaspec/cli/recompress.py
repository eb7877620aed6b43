"""What ``deltaspec combine`` and ``deltaspec resize`` share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import click

from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options import AnalyzeOptions, ExtractOptions

F = TypeVar("F", bound=Callable[..., Any])


def common_options(function: F) -> F:
    """Add -o, --base, --device, --overwrite, --json and --quiet."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object."),
        click.option("--overwrite", is_flag=True, help="Replace an adapter that is there."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or a list."),
        click.option("--base", metavar="BASE", help="The base model; needed for files in kohya's naming."),
        click.option("-o", "--out", type=click.Path(), required=True, help="The new adapter's folder."),
    ):
        function = option(function)
    return function


def recompress(
    given: Sequence[str],
    options: ExtractOptions,
    *,
    base: str | None,
    out: str,
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the workflow and print its report."""
    options = replace(options, analysis=AnalyzeOptions(device=device))
    from deltaspec.cli.certificate import render_reports
    from deltaspec.workflows.extraction.combine import combine
    from deltaspec.workflows.merging.merge import parse_adapter

    adapters = [parse_adapter(text) for text in given]
    with stoppable(), Progress(quiet=quiet) as progress:
        reports = combine(adapters, out, base=base, options=options, overwrite=overwrite, progress=progress)
    click.echo(json.dumps(reports, ensure_ascii=False) if as_json else render_reports(reports))
    if not as_json:
        click.echo(f"\nAdapter: {out}")
