"""Exit code 1 where blocks of a model have no counterpart in the other, unless part of it is meant."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from deltaspec.types.identity import OneSidedBlocks


def stop_if_partial(rows: Sequence[OneSidedBlocks], *, meant: bool) -> None:
    """End the command where blocks have no counterpart; ``meant`` is --partial."""
    if rows and not meant:
        blocks = sum(row["blocks"] for row in rows)
        advice = "pass --partial if part of a model is meant, or --map where its names differ"
        said = f"{blocks} blocks have" if blocks > 1 else "1 block has"
        click.echo(f"Incomplete: {said} no counterpart; {advice}.", err=True)
        sys.exit(1)
