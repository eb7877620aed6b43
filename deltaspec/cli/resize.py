"""``deltaspec resize``."""

from __future__ import annotations

from typing import Any

import click

from deltaspec.cli.choices import FORM, parse_ranks, rank_options
from deltaspec.cli.flags import flags, take
from deltaspec.cli.recompress import common_options, recompress
from deltaspec.options import ExtractOptions, FormOptions


@click.command()
@click.argument("adapter")
@rank_options(above_rounding=False)
@flags(FormOptions, *FORM)
@common_options
def resize(adapter: str, **given: Any) -> None:
    """Write ADAPTER at another rank, the best there is: exact through QR, never dense."""
    recompress((adapter,), ExtractOptions(parse_ranks(given), take(FormOptions, given)), given)
