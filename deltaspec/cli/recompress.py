"""What ``deltaspec combine`` and ``deltaspec resize`` share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import click

from deltaspec.cli.flags import Writing, flags, take
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options import AnalyzeOptions, ExtractOptions, PairOptions

F = TypeVar("F", bound=Callable[..., Any])


def common_options(function: F) -> F:
    """Add -o, --base, --component, --device, --overwrite, --json and --quiet."""
    function = flags(Writing)(function)
    function = flags(AnalyzeOptions, "device")(function)
    function = flags(PairOptions, "component")(function)
    function = click.option("--base", metavar="BASE", help="The base model; needed for files in kohya's naming.")(
        function
    )
    return click.option("-o", "--out", type=click.Path(), required=True, help="The new adapter's folder.")(function)


def recompress(named: Sequence[str], options: ExtractOptions, given: dict[str, Any]) -> None:
    """Run the workflow and print its report."""
    given |= {"pairing": take(PairOptions, given)}
    options = replace(options, analysis=take(AnalyzeOptions, given))
    writing, base, out = take(Writing, given), given.pop("base"), given.pop("out")
    from deltaspec.cli.certificate import render_reports
    from deltaspec.workflows.extraction.combine import combine
    from deltaspec.workflows.merging.merge import parse_adapter

    adapters = [parse_adapter(text) for text in named]
    with stoppable(), Progress(quiet=writing.quiet) as progress:
        reports = combine(adapters, out, base=base, options=options, overwrite=writing.overwrite, progress=progress)
    click.echo(json.dumps(reports, ensure_ascii=False) if writing.as_json else render_reports(reports))
    if not writing.as_json:
        click.echo(f"\nAdapter: {out}")
