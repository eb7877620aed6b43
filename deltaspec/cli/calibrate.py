"""``deltaspec calibrate``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from deltaspec.cli.flags import Writing, flags, take
from deltaspec.cli.progress import Progress
from deltaspec.cli.stop import stoppable
from deltaspec.options import CalibrateOptions, TextOptions


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
@flags(TextOptions)
@flags(CalibrateOptions)
@flags(Writing)
def calibrate(model: str, text: Path, out: Path, **given: Any) -> None:
    """Run MODEL on a text and store the second moments of what its linear layers take in.

    Causal models read the texts (lines, rows) one after another, each closed by the end-of-text token, in sequences
    of --length tokens; for all others each text is a sequence. Needs the extra ``train``.
    """
    options = replace(take(CalibrateOptions, given), text=take(TextOptions, given))
    writing = take(Writing, given)
    from deltaspec.workflows.extraction.calibrate import calibrate as run_calibration

    with stoppable(), Passes(quiet=writing.quiet) as progress:
        moments = run_calibration(model, text, out, options=options, overwrite=writing.overwrite, progress=progress)
    about = moments.about
    if writing.as_json:
        click.echo(json.dumps({"path": str(out), **about}, ensure_ascii=False))
        return
    shared = len(about["aliases"])
    click.echo(f"{len(moments.names)} layers over {about['tokens']} tokens; {shared} share another's moments.")
    for reason, count in Counter(row["reason"] for row in about["left_out"]).most_common():
        example = next(row["tensor"] for row in about["left_out"] if row["reason"] == reason)
        click.echo(f"Left out: {count} ({reason}), for example {example}")
    click.echo(f"\nMoments: {out}  (deltaspec extract --calibration)")
