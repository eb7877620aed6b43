"""``deltaspec help``: the manual, which ships with the package."""

from __future__ import annotations

import sys
from importlib.resources import files

import click

from deltaspec.errors import OptionError


def list_topics() -> dict[str, str]:
    """Return the manual's pages, name → title; those that are generated come last."""
    pages = [page for page in (files("deltaspec") / "manual").iterdir() if page.name.endswith(".md")]
    titles = {page.name.removesuffix(".md"): page.read_text("utf-8").splitlines()[0].lstrip("# ") for page in pages}
    return dict(sorted(titles.items(), key=lambda row: (row[0].startswith("reference-"), row[0])))


def read_page(topic: str) -> str:
    """Return the text of a page.

    Raises
    ------
    OptionError
        If there is no such page.
    """
    topics = list_topics()
    if topic not in topics:
        message = f"The manual has no page '{topic}': expected one of {', '.join(topics)}."
        raise OptionError(message)
    return (files("deltaspec") / "manual" / f"{topic}.md").read_text("utf-8")


@click.command()
@click.argument("topic", required=False)
def help(topic: str | None) -> None:
    """Show the manual's page on TOPIC, page by page on a terminal; without one, list the pages."""
    if topic is None:
        topics = list_topics()
        width = max(map(len, topics))
        click.echo("\n".join(f"{name.ljust(width)}  {title}" for name, title in topics.items()))
        click.echo("\nRead one with deltaspec help TOPIC; a command's options with deltaspec COMMAND --help.")
        return
    text = read_page(topic)
    if sys.stdout.isatty():
        click.echo_via_pager(text)
    else:
        click.echo(text, nl=False)
