"""Which tensors of two sides belong together, where their names leave it open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaspec.errors import OptionError
from deltaspec.options.option import documented, option


@documented
@dataclass(frozen=True, slots=True)
class PairOptions:
    """Which tensors of two sides belong together, where their names leave it open."""

    map: tuple[str, ...] = option(
        (),
        "Replace a prefix, or a whole name, of the tuned side's (the adapter's) tensors before they are paired; with "
        "nothing before the = NEW goes before all names. May be given several times: of a name the first that fits.",
        metavar="OLD=NEW",
        repeated=True,
    )
    component: str = option(
        "",
        "Which component of an adapter's file is meant that holds several: unet, te, te1, te2, …; empty takes all that "
        "fit the base.",
        metavar="NAME",
    )
    partial: bool = option(
        False, "Part of a model is meant: blocks that only one side has are told, and no longer end in exit code 1."
    )

    def __post_init__(self) -> None:
        """Refuse a map that names nothing."""
        if isinstance(self.map, str):
            message = f"map is '{self.map}': expected a tuple, such as ('{self.map}',)."
            raise OptionError(message)
        for pair in self.map:
            old, equals, new = pair.partition("=")
            if not equals or old == new:
                message = f"--map is '{pair}': expected OLD=NEW, two different beginnings of names."
                raise OptionError(message)

    def identity(self) -> dict[str, Any]:
        """Return what decides which tensors are paired, where it is given."""
        found = {"map": list(self.map), "component": self.component}
        return {name: value for name, value in found.items() if value}
