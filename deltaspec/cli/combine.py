"""``deltaspec combine``."""

from __future__ import annotations

from typing import Any

import click

from deltaspec.cli.choices import FORM, parse_ranks, rank_options
from deltaspec.cli.flags import flags, take
from deltaspec.cli.recompress import common_options, recompress
from deltaspec.options import ExtractOptions, FormOptions


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]…")
@rank_options(above_rounding=False)
@flags(FormOptions, *FORM)
@common_options
def combine(adapters: tuple[str, ...], **given: Any) -> None:
    """Add adapters of one base, each times its weight, and write the sum as one adapter.

    Without a policy nothing is lost: the rank is the sum of the ranks. Adapters are PEFT LoRA folders, or
    .safetensors files in kohya's naming.
    """
    options = ExtractOptions(parse_ranks(given, fallback="1000000000"), take(FormOptions, given))
    recompress(adapters, options, given)
