"""Group what is wrong, and what was refused, by what it looks like."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

PATTERNS = (  # found in a reason, cause; the first that fits
    (r"exit 70: (\w+)", "crash: {}"),
    (r"PEFT cannot load it: \w+: \[PEFT:PeftType.LORA\] Module", "PEFT cannot load it: it refuses this kind of module"),
    (r"PEFT cannot load it: \w+: Target module", "PEFT cannot load it: the target is no layer that takes factors"),
    (r"PEFT cannot load it: KeyError", "PEFT cannot load it: a whole tensor's module has no such key"),
    (r"PEFT cannot load it: \w+: lora_bias", "PEFT cannot load it: lora_bias beside an embedding"),
    (r"PEFT cannot load it: (\w+: .{0,60})", "PEFT cannot load it: {}"),
    (r"PEFT cannot run it: (\w+: .{0,60})", "PEFT cannot run it: {}"),
    (r"PEFT: unexpected keys: (?:base_model\.model\.)?lm_head\.", "keys that PEFT drops: a head under another name"),
    (r"PEFT: unexpected keys: \S+\.weight(?:,| \()(?!.*lora_)", "keys that PEFT drops: tensors stored whole"),
    (r"PEFT: unexpected keys", "keys that PEFT drops: factors under a name that runs nowhere"),
    (r"PEFT: Found missing", "modules that PEFT targets and the adapter does not hold"),
    (r"instead of", "numbers or shapes that are not those expected"),
    (r"neither a row nor skipped", "a stored tensor that is nowhere"),
    (r"which \S+ lacks: pass the base", "merge: targets a name that the base does not store"),
    (r"^outputs\S*: off by [\d.e+-]+ of the effect$", "outputs differ though every weight is right"),
    (r"outputs", "weights and outputs differ"),
    (r"off by", "weights differ"),
    (r"exit 0 where PEFT is wrong", "verify certifies what PEFT does not compute"),
    (r"exit \d where PEFT is right", "verify rejects what PEFT computes"),
    (r"exit 2: Error: (.{0,50})", "refused: {}"),
)


def causes_of(row: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield kind, cause, check and reason of whatever is not right in a row."""
    for check, (kind, reason) in row["verdicts"].items():
        if kind in ("WRONG", "refused"):
            yield kind, _cause(reason), check, reason


def _cause(reason: str) -> str:
    for pattern, cause in PATTERNS:
        if found := re.search(pattern, reason):
            return cause.format(*(re.sub(r"'[^']*'?|/\S+", "…", group) for group in found.groups()))
    return reason[:80]


def print_causes(rows: Sequence[dict[str, Any]]) -> None:
    """Print each cause with how many architectures it is in, and a line for each of them."""
    groups: defaultdict[tuple[str, str], dict[str, tuple[set[str], str]]] = defaultdict(dict)
    for row in rows:
        for kind, cause, check, reason in causes_of(row):
            checks, first = groups[kind, cause].setdefault(row["name"], (set(), reason))
            checks.add(check)
            groups[kind, cause][row["name"]] = (checks, first)
    for (kind, cause), members in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        print(f"\n{kind}: {cause} ({len(members)})")
        for name, (checks, reason) in members.items():
            print(f"  {name} [{', '.join(_ordered(checks))}] {reason[:260]}")


def _ordered(checks: Iterable[str]) -> list[str]:
    return sorted(checks)
