"""``deltaspec verify``."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from deltaspec.architecture.roles import group_rare
from deltaspec.cli.flags import Output, flags, take
from deltaspec.cli.one_sided import stop_if_partial
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.cli.table import printable, table, warn_one_sided
from deltaspec.errors import OptionError
from deltaspec.options import AnalyzeOptions, PairOptions, TextOptions

if TYPE_CHECKING:
    from deltaspec.workflows.verification.recompute_matrix import CheckedMatrix
    from deltaspec.workflows.verification.verify import Verification


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.argument("adapter")
@click.option("--text", type=click.Path(), help="Also run the three models on this text and compare what they say.")
@flags(TextOptions, "field", "tokens", defaults={"tokens": 8192})
@flags(AnalyzeOptions, "vocab", "device", "workers")
@flags(PairOptions)
@flags(Output)
def verify(base: str, tuned: str, adapter: str, text: str | None, **given: Any) -> None:
    """Read ADAPTER back and recompute its error against the change from BASE to TUNED.

    Exit code 1 if it is worse than its deltaspec.json claims, or than none, or blocks have no counterpart; 2 if it
    cannot be checked.
    """
    given |= {"pairing": take(PairOptions, given)}
    options, output = take(AnalyzeOptions, given), take(Output, given)
    if text and options.pairing.identity():
        message = "--text runs the models, whose names --map and --component do not change: leave it out."
        raise OptionError(message)
    settings = take(TextOptions, given | {"device": options.device.split(",")[0]})
    from deltaspec.workflows.verification.verify import verify as run_verification

    with stoppable():
        with Progress(quiet=output.quiet) as progress:
            found = run_verification(base, tuned, adapter, options=options, progress=progress)
        said = _divergence((base, tuned, adapter), text, options=settings, quiet=output.quiet) if text else None
    click.echo(json.dumps({**asdict(found), "divergence": said}) if output.as_json else _render(found, said))
    if found.worse or found.missing or found.unattached or found.totals.error > 1:
        sys.exit(1)
    stop_if_partial(found.one_sided, meant=options.pairing.partial)


def _divergence(models: tuple[str, str, str], text: str, *, options: TextOptions, quiet: bool) -> dict[str, Any]:
    """Run the three models, and say on stderr which one."""
    from deltaspec.workflows.shared.text_batches import Text
    from deltaspec.workflows.verification.divergence import divergence

    tell = None if quiet else partial(click.echo, err=True)
    return asdict(divergence(*models, Text(Path(text), options), progress=tell))


def _render(found: Verification, said: dict[str, Any] | None) -> str:
    groups: defaultdict[str, list[CheckedMatrix]] = defaultdict(list)
    shown = group_rare(Counter(row.role for row in found.rows))
    for row in found.rows:
        groups[shown[row.role]].append(row)
    rows = [
        {
            "role": role,
            "matrices": len(group),
            "rank": median(row.rank for row in group),
            "error": f"{median(row.error for row in group):.6f}",
            "best": f"{median(row.optimum for row in group):.6f}",
            "worst": f"{max(row.error for row in group):.6f}",
        }
        for role, group in groups.items()
    ]
    totals = found.totals
    parts = [table(rows), f"All matrices: error {totals.error:.6f}, best at these ranks {totals.optimum:.6f}."]
    if said:
        parts.append(_say(said))
    if totals.error > 1:
        parts.append("Worse than no adapter at all: does it belong to this base and tuned model, in this order?")
    if found.worse:
        parts.append(f"Worse than claimed: {', '.join(map(printable, found.worse))}.")
    if found.missing:
        parts.append(f"Claimed and not there: {', '.join(map(printable, found.missing))}.")
    if found.unattached:
        idle = ", ".join(map(printable, found.unattached[:8]))
        further = f" and {len(found.unattached) - 8} more" if len(found.unattached) > 8 else ""
        parts.append(f"Without effect once PEFT loads the adapter: {idle}{further}.")
    parts += warn_one_sided(found.one_sided)
    if found.rest:
        right = sum(row.right for row in found.rest)
        parts.append(f"Beside the factors: {right} of {len(found.rest)} biases and whole tensors are the fine-tune's.")
    parts.append(f"attachment: {printable(found.attachment)}")
    if found.claims and not found.worse and not found.missing and not found.unattached:
        parts.append("As good as deltaspec.json claims.")
    elif not found.claims:
        parts.append("It holds no deltaspec.json that speaks of this pair: nothing was claimed.")
    return "\n\n".join(parts)


def _say(said: dict[str, Any]) -> str:
    return (
        f"On the text ({said['measure']}, {said['tokens']:,} tokens): KL to the tuned model {said['kl_adapter']:.4g} "
        f"with the adapter, {said['kl_base']:.4g} without; top-1 agreement {100 * said['top1_adapter']:.2f} % and "
        f"{100 * said['top1_base']:.2f} %."
    )
