"""``deltaspec help``: the manual, which ships with the package."""

from __future__ import annotations

import sys
from collections.abc import Collection
from difflib import get_close_matches
from importlib.resources import files

import click

from deltaspec.errors import OptionError


def list_topics() -> dict[str, str]:
    """Return the manual's pages, name → title; those that are generated come last."""
    pages = [page for page in (files("deltaspec") / "manual").iterdir() if page.name.endswith(".md")]
    titles = {page.name.removesuffix(".md"): page.read_text("utf-8").splitlines()[0].lstrip("# ") for page in pages}
    return dict(sorted(titles.items(), key=lambda row: (row[0].startswith("reference-"), row[0])))


def read_page(topic: str, *, commands: Collection[str] = ()) -> str:
    """Return the text of a page.

    Parameters
    ----------
    topic : str
        A page's name, in any case; of generated pages also without ``reference-``.
    commands : collection of str
        Names that are not pages, but have a help of their own.

    Raises
    ------
    OptionError
        If there is no such page.
    """
    topics, asked = list_topics(), topic.lower()
    topic = asked if asked in topics else f"reference-{asked}"
    if topic not in topics:
        near = next(iter(get_close_matches(asked, topics, n=1)), "")
        hint = f"did you mean '{near}'? There are" if near else "expected one of"
        if asked in commands:
            hint = f"'{asked}' is a command, see deltaspec {asked} --help; pages are"
        message = f"The manual has no page '{asked}': {hint} {', '.join(topics)}."
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
    text = read_page(topic, commands=_list_commands())
    if sys.stdout.isatty():
        click.echo_via_pager(text)
    else:
        click.echo(text, nl=False)


def _list_commands() -> list[str]:
    """Name the commands of the program that this one is a part of."""
    context = click.get_current_context(silent=True)
    root = context.find_root() if context else None
    return root.command.list_commands(root) if root and isinstance(root.command, click.Group) else []
