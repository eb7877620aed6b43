"""The families of patterns.toml, compiled once; what a name ending means, and which family a checkpoint belongs to."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from deltaspec.architecture.roles import fused_role
from deltaspec.types import MatrixKey

# Nine digits at most: a longer number is no index, and int() refuses very long ones.
EXPERT = re.compile(r"(?:^|(?<=\.))experts\.(?:expert_)?([0-9]{1,9})(?=\.)")
LONGEST_ENDING = 4


@dataclass(frozen=True, slots=True)
class RoleEntry:
    """One line of a family's role table; see the head of patterns.toml."""

    role: str = ""
    parts: tuple[str, ...] = ()
    layout: str = "equal"
    transposed: bool = False
    experts: bool = False

    @property
    def unsplit_role(self) -> str:
        """The role of the whole tensor, where its parts cannot be told apart."""
        return self.role or fused_role(self.parts, otherwise="qkv_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """One block of patterns.toml, compiled."""

    name: str
    model_types: frozenset[str]
    depth: re.Pattern[str]
    stacks: tuple[tuple[str, re.Pattern[str]], ...]
    roles: dict[str, RoleEntry]

    def find(self, name: str) -> RoleEntry | None:
        """Return the entry of the longest known ending of a tensor's name."""
        return next((self.roles[ending] for ending in _list_endings(name) if ending in self.roles), None)

    def place(self, name: str) -> MatrixKey:
        """Return a key with the name's depth, stack and expert, its role still open."""
        block, expert = self.depth.search(name), EXPERT.search(name)
        return MatrixKey(
            name,
            depth=int(block[1] or 0) if block else None,
            expert=int(expert[1]) if expert else None,
            stack=next((stack for stack, pattern in self.stacks if pattern.search(name)), ""),
        )


@cache
def load_families() -> tuple[Family, ...]:
    """Read patterns.toml.

    Returns
    -------
    tuple of Family
        In the file's order, each with what it inherits; the last one is the generic rule.
    """
    blocks = tomllib.loads(files("deltaspec.architecture").joinpath("patterns.toml").read_text(encoding="utf-8"))
    merged: dict[str, dict[str, Any]] = {}
    for name, block in blocks.items():
        parent = merged.get(block.get("extends", ""), {})
        merged[name] = {**parent, **block, "roles": {**parent.get("roles", {}), **block.get("roles", {})}}
    return tuple(_compile_family(name, block) for name, block in merged.items())


@lru_cache(maxsize=2048)
def _list_endings(name: str) -> tuple[str, ...]:
    stem = EXPERT.sub("experts", name.removesuffix(".weight"))
    pieces = stem.rsplit(".", LONGEST_ENDING)[-LONGEST_ENDING:]
    return tuple(".".join(pieces[start:]) for start in range(len(pieces)))


def _compile_family(name: str, block: dict[str, Any]) -> Family:
    entries = {}
    for ending, value in block["roles"].items():
        fields = {"role": value} if isinstance(value, str) else value
        entries[ending] = RoleEntry(**{**fields, "parts": tuple(fields.get("parts", ()))})
    stacks = tuple((stack, re.compile(pattern)) for stack, pattern in block.get("stacks", {}).items())
    return Family(name, frozenset(block["model_types"]), re.compile(block["depth"]), stacks, entries)


def select_families(model_types: Iterable[str]) -> tuple[Family, ...]:
    """Find the families that a config names.

    Parameters
    ----------
    model_types : iterable of str
        Values of model_type, the most important first.

    Returns
    -------
    tuple of Family
        Each once, in the order of the values; empty if none is known.
    """
    found = [family for kind in model_types for family in load_families() if kind in family.model_types]
    return tuple({family.name: family for family in found}.values())
