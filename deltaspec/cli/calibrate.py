"""``deltaspec calibrate``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import click

from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options import CalibrateOptions, TextOptions

TEXT = {field.name: field.default for field in fields(TextOptions)}
DEFAULT = {field.name: field.default for field in fields(CalibrateOptions)}


class Passes(Progress):
    """Progress in layers stored and tokens read."""

    def line(self) -> str:
        """Say how far it is."""
        step = self.step
        if step is None:
            return "loading the model"
        share = step.work_done / step.work_total if step.work_total else 1.0
        return f"{step.done}/{step.total} matrices stored, {step.work_done} tokens read, {share:.0%}"


@click.command()
@click.argument("model")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A .txt, .jsonl, .csv or .tsv file.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write: NAME.safetensors.")
@click.option(
    "--field",
    default=TEXT["field"],
    show_default=True,
    help="Key of .jsonl; column of .csv or .tsv, by name, or by number from 1 in a file without a line of names.",
)
@click.option("--tokens", default=TEXT["tokens"], show_default=True, help="Read at most so many, from the beginning.")
@click.option("--length", default=TEXT["length"], show_default=True, help="Tokens of a sequence at most.")
@click.option("--batch", default=TEXT["batch"], show_default=True, help="Sequences of full length at once.")
@click.option("--device", default=TEXT["device"], show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--dtype", default=DEFAULT["dtype"], show_default=True, help="Compute in auto (as stored), bf16, fp32 …")
@click.option("--include", default=DEFAULT["include"], metavar="REGEX", help="Only tensors whose name this finds.")
@click.option("--exclude", default=DEFAULT["exclude"], metavar="REGEX", help="No tensors whose name this finds.")
@click.option(
    "--memory",
    default=DEFAULT["memory"],
    show_default=True,
    metavar="BYTES",
    help="Moments held at once; the text is read again for each group of layers that fits.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress.")
def calibrate(model: str, text: Path, out: Path, overwrite: bool, as_json: bool, quiet: bool, **given: object) -> None:
    """Run MODEL on a text and store the second moments of what its linear layers take in.

    Causal models read the texts (lines, rows) one after another, each closed by the end-of-text token, in sequences
    of --length tokens; for all others each text is a sequence. Needs the extra ``train``.
    """
    settings = TextOptions(**{name: given.pop(name) for name in TEXT})  # type: ignore[arg-type]
    options = CalibrateOptions(settings, **given)  # type: ignore[arg-type]
    from deltaspec.workflows.extraction.calibrate import calibrate as run_calibration

    with stoppable(), Passes(quiet=quiet) as progress:
        moments = run_calibration(model, text, out, options=options, overwrite=overwrite, progress=progress)
    about = moments.about
    if as_json:
        click.echo(json.dumps({"path": str(out), **about}, ensure_ascii=False))
        return
    shared = len(about["aliases"])
    click.echo(f"{len(moments.names)} layers over {about['tokens']} tokens; {shared} share another's moments.")
    for reason, count in Counter(row["reason"] for row in about["left_out"]).most_common():
        example = next(row["tensor"] for row in about["left_out"] if row["reason"] == reason)
        click.echo(f"Left out: {count} ({reason}), for example {example}")
    click.echo(f"\nMoments: {out}  (deltaspec extract --calibration)")
