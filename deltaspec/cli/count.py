"""``deltaspec count``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from deltaspec.cli.flags import take
from deltaspec.cli.methods import method_options, parse_method
from deltaspec.cli.table import printable
from deltaspec.options import TargetOptions
from deltaspec.options.recipe import Recipe

if TYPE_CHECKING:
    from deltaspec.workflows.training.count import Counts


@click.command()
@click.argument("model")
@method_options
@click.option("--task", default="", metavar="TASK", help="classification or causal-lm, instead of the config's class.")
@click.option("--labels", default=0, metavar="N", help="Classes of a classification; 0: as the config says.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def count(model: str, task: str, labels: int, as_json: bool, **given: Any) -> None:
    """Count what a method trains and stores on MODEL, from its config alone.

    MODEL is a folder with a config.json, such a file, or a hub id (owner/name@revision), of which only config.json is
    fetched. Nothing is loaded, so any size is quick. Needs the extra ``train``.
    """
    method, options = parse_method(given)
    recipe = Recipe(method=method, method_options=options, targets=take(TargetOptions, given))
    from deltaspec.workflows.training.count import count as run_count
    from deltaspec.workflows.training.count import counts_to_json

    counts = run_count(model, recipe, task=task, labels=labels)
    click.echo(json.dumps(counts_to_json(counts)) if as_json else render_counts(counts))


def render_counts(counts: Counts) -> str:
    """Render roles, then totals with their share and bytes, then what is left out."""
    from deltaspec.workflows.training.count import describe_left_out

    size = counts.bytes
    rows = [["role", "matrices", "shape", "trainable"]]
    for row in counts.roles:
        shapes = ", ".join(f"{d_out} × {d_in}" for d_out, d_in in row.shapes[:3]) + (", …" if row.shapes[3:] else "")
        rows.append([printable(row.role), f"{row.matrices:,}" if row.matrices else "", shapes, f"{row.trainable:,}"])
    sums = [["trainable", f"{counts.trainable:,}", f"{counts.trainable / counts.total:.4%} of total"]]
    if counts.head:
        sums.append(["head", f"{counts.head:,}", f"trained beside it, {_bytes(size['head'])} in fp32"])
    sums.append(["stored", f"{counts.stored:,}", f"{_bytes(size['stored'])} in fp32"])
    sums.append(["total", f"{counts.total:,}", counts.model])
    sums.append(["AdamW", "", f"{_bytes(size['optimizer'])} of moments"])
    note, left_out = "", describe_left_out(counts.left_out)
    if counts.method == "vblora" and counts.released > counts.stored:
        note = f"Note: stored counts what --save-topk releases; released without it, it holds {counts.released:,}."
    return "\n\n".join(
        filter(None, [_align(rows, right={1, 3}), _align(sums, right={1}), note, left_out and f"{left_out}."])
    )


def _align(rows: list[list[str]], *, right: set[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _bytes(number: float) -> str:
    """Write bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
