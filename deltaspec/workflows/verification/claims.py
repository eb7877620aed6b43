"""What ``deltaspec.json`` says of an adapter: which errors, tensors stored whole and biases it claims."""

from __future__ import annotations

import json
from dataclasses import dataclass

from deltaspec.errors import CheckpointError
from deltaspec.io.fingerprint import fingerprint
from deltaspec.types import AdapterIndex, Checkpoint


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed of one matrix: ‖ΔW - BA‖/‖ΔW‖, and the rank of its factors."""

    error: float
    rank: int


@dataclass(frozen=True, slots=True)
class Claims:
    """What is claimed: of each matrix by its key, tensors stored whole, modules with their bias; and what is not."""

    matrices: dict[str, Claim]
    whole: tuple[str, ...]
    biased: tuple[str, ...]
    left: frozenset[str] = frozenset()


def read_claims(adapter: AdapterIndex, tuned: Checkpoint | AdapterIndex) -> Claims | None:
    """Read what ``deltaspec.json`` says; None where there is none, or it speaks of another model.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    path = adapter.root / "deltaspec.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("tuned", {}).get("files") != fingerprint(tuned):
            return None
        matrices = {row["matrix"]: Claim(float(row["error"]), int(row["rank"])) for row in found["matrices"]}
        gone = {row["tensor"] for row in found["not_carried"]}
        biased = tuple(p for p, module in found["modules"].items() if module["bias"] and f"{p}.bias" not in gone)
        return Claims(matrices, tuple(map(str, found["whole"])), biased, frozenset(gone))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as cause:
        message = f"Cannot read the claims in '{path}' ({cause}): extract the adapter again."
        raise CheckpointError(message) from cause
