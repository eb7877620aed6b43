"""``deltaspec train``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from deltaspec.cli.flags import Writing, flags, take
from deltaspec.cli.methods import method_options
from deltaspec.cli.stop import stoppable
from deltaspec.cli.train_flags import parse_training, training_options
from deltaspec.cli.train_report import Ticks, describe
from deltaspec.errors import NumericalError


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="A csv, tsv, jsonl, txt or parquet file, or a data set of the hub.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Training folder to write.")
@click.option("--eval-data", metavar="FILE", help="Data to evaluate on, instead of a share that is held out.")
@click.option("--forget", metavar="FILE", help="Other data; what the model loses on them is measured before and after.")
@click.option("--forget-text", metavar="COLUMN", help="The --text of the data of --forget.")
@click.option("--forget-label", metavar="COLUMN", help="The --label of the data of --forget.")
@click.option("--forget-limit", metavar="N", type=int, help="The --limit of the data of --forget.")
@method_options
@training_options
@flags(Writing)
def train(model: str, data: str, out: Path, **given: Any) -> None:
    """Fine-tune MODEL by any method, and say what it learned and forgot.

    The same command goes on where a stopped one was. Several processes: accelerate launch --no_python deltaspec train
    … . Needs the extra ``train``.
    """
    recipe, writing = parse_training(data, given), take(Writing, given)
    from deltaspec.workflows.training.train import train as run_training

    first = os.environ.get("RANK", "0") == "0"
    progress = Ticks(quiet=writing.quiet or not first)
    with stoppable(), progress:
        try:
            report = run_training(model, out, recipe, overwrite=writing.overwrite, progress=progress)
        except NumericalError as failure:
            click.echo(f"Error: {failure}", err=True)
            sys.exit(1)
    if first:
        click.echo(json.dumps(report, ensure_ascii=False) if writing.as_json else "\n".join(describe(report, out)))
