"""``deltaspec resize``."""

from __future__ import annotations

from typing import Any

import click

from deltaspec.cli.choices import form_options, parse_form, parse_ranks, rank_options
from deltaspec.cli.recompress import common_options, recompress
from deltaspec.options import ExtractOptions


@click.command()
@click.argument("adapter")
@rank_options("rank", "energy", "error", "params", "size")
@form_options(extras=False)
@common_options
def resize(adapter: str, **given: Any) -> None:
    """Write ADAPTER at another rank, the best there is: exact through QR, never dense."""
    recompress((adapter,), ExtractOptions(parse_ranks(given), parse_form(given)), **given)
