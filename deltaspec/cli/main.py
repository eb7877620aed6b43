"""The entry point: command name → file and one-line help; a command is imported only when it is called."""

from __future__ import annotations

import gc
import importlib
import os
import sys

import click

from deltaspec.cli.table import printable
from deltaspec.errors import DeltaspecError

COMMANDS = {
    "analyze": "Decompose what fine-tuning changed, matrix by matrix, into a run directory.",
    "extract": "Turn a full fine-tune into a LoRA adapter, with a certificate.",
    "verify": "Read an adapter back and recompute how good it is.",
    "calibrate": "Measure what a model's layers take in on a text, for a data-aware extraction.",
    "combine": "Add adapters to each other and recompress the sum.",
    "resize": "Write an adapter at another rank.",
    "merge": "Add adapters to their base, shard by shard, and say what rounding lost.",
    "train": "Fine-tune a model by any method, and say what it learned and forgot.",
    "count": "Count what a method would train and store, from a model's config alone.",
    "compare": "Put trainings of one base side by side: learned, forgotten, cost, spectra.",
    "show": "Print a run's table again: by role, by depth or by matrix.",
    "export": "Write a run's records as CSV, JSON or Parquet.",
    "plot": "Draw a run's figures.",
    "help": "Show a page of the manual.",
}
MANUAL = {
    **dict.fromkeys(("analyze", "show", "plot"), "numbers"),
    **dict.fromkeys(("extract", "verify", "calibrate", "combine", "resize", "merge"), "adapters"),
    **dict.fromkeys(("train", "count", "compare"), "training"),
    "export": "formats",
}
"""Command → the page of the manual that explains it."""


class UserMistake(click.ClickException):
    """One sentence on stderr, exit code 2."""

    exit_code = 2


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in reading order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command's file."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"deltaspec.cli.{cmd_name}"), cmd_name)
        if cmd_name in MANUAL:
            command.epilog = f"Manual: deltaspec help {MANUAL[cmd_name]}"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names and help from COMMANDS."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Turn a user's mistake into one sentence on stderr and exit code 2."""
        try:
            return super().invoke(ctx)
        except DeltaspecError as error:
            said = " ".join([str(error), *getattr(error, "__notes__", ())])
            raise UserMistake(printable(said)) from error  # it may hold names from files


@click.group(cls=LazyGroup, epilog="Manual: deltaspec help", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="deltaspec")
def cli() -> None:
    """Say what fine-tuning changed: singular-value spectra of weight deltas."""


def main() -> None:
    """Run the command line; a reader that closes the pipe early ends it quietly."""
    gc.set_threshold(50_000)  # importing torch makes a million objects that stay: looking at them took 0.15 CPU s
    try:
        cli()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk behind stdout, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr.write(f"Error: cannot write the output ({error.strerror}): free space, or send it elsewhere.\n")
        sys.exit(2)


if __name__ == "__main__":  # accelerate launch -m deltaspec.cli.main
    main()
