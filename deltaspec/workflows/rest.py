"""What an adapter does not carry: each tensor with its share of the change, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.delta import DenseDelta
from deltaspec.errors import NumericalError
from deltaspec.io.matrix import read_low_rank, read_tensor
from deltaspec.pairing.modules import grown_rows
from deltaspec.pairing.plan import VectorPair
from deltaspec.types import LowRankSource, MatrixSource, TensorSpec, WeightPair
from deltaspec.workflows.finite import locate

if TYPE_CHECKING:
    from deltaspec.workflows.sources import Sources

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Leftover:
    """A tensor of the tuned model that gets no factors; ``energy`` is ‖Δ‖² of it, None where it has no delta.

    ``whole`` is the tuned tensor, where an adapter may store it as it is.
    """

    name: str
    role: str
    reason: str
    energy: float | None
    whole: TensorSpec | None = None


@dataclass(slots=True)
class Rest:
    """All that is outside the factors, and the changes of the biases that may go beside them."""

    leftovers: list[Leftover] = field(default_factory=list)
    biases: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)  # tensor → its change, when read
    unchanged: list[str] = field(default_factory=list)


def measure_rest(sources: Sources, rows: Mapping[str, dict[str, Any]], *, device: torch.device) -> Rest:
    """Stream every tensor without factors once, and list those that changed.

    Parameters
    ----------
    sources : Sources
    rows : mapping
        Finished factorizations by matrix: those with no energy are unchanged.
    device : torch.device
    """
    rest = Rest()
    for module in sources.modules:
        grown = grown_rows(module.pairs[0])
        if grown:
            name = f"{module.name} (rows {grown[0]} to {grown[1] - 1})"
            rest.leftovers.append(Leftover(name, module.pairs[0].key.role, "rows that the base lacks", None))
        if not any(rows[str(pair.key)]["energy"] for pair in module.pairs):
            rest.unchanged.append(module.name)
    homes = {str(pair.key) for module in sources.modules for pair in module.pairs}
    inside = {module.name for module in sources.modules}
    for pair in sources.plan.pairs:
        if str(pair.key) not in homes and pair.key.tensor not in inside:
            _add(rest, pair, sources.left.get(pair.key.tensor, "left out"), device)
    for vector in sources.plan.vectors:
        _add_vector(rest, vector, inside={module.path for module in sources.modules})
    for row in sources.plan.skipped:
        _add_skipped(rest, sources, row["tensor"], row["reason"])
    return rest


def _add(rest: Rest, pair: WeightPair, reason: str, device: torch.device) -> None:
    whole = pair.tuned.spec if isinstance(pair.tuned, MatrixSource) else None
    energy = _energy(pair, device)
    if energy:
        rest.leftovers.append(Leftover(str(pair.key), pair.key.role, reason, energy, whole))
    else:
        rest.unchanged.append(str(pair.key))


def _energy(pair: WeightPair, device: torch.device) -> float:
    if isinstance(pair.tuned, LowRankSource):
        factors = read_low_rank(pair.tuned)
        return float(((factors.lora_B.mT @ factors.lora_B) * (factors.lora_A @ factors.lora_A.mT)).sum())
    assert isinstance(pair.base, MatrixSource)
    energy = float(sum(block.square().sum() for block in DenseDelta(pair.base, pair.tuned, device=device).blocks()))
    if energy != energy or energy == float("inf"):
        raise locate(pair, str(pair.key), NumericalError("it holds NaN or infinity."))
    return energy


def change_of(vector: VectorPair) -> torch.Tensor:
    """Return the change of a norm or bias, flat float64."""
    tuned = read_tensor(vector.tuned).to(torch.float64).reshape(-1)[: vector.rows]
    if vector.scaling is not None:
        return tuned * vector.scaling
    assert vector.base is not None
    return tuned - read_tensor(vector.base).to(torch.float64).reshape(-1)[: vector.rows]


def _add_vector(rest: Rest, vector: VectorPair, *, inside: set[str]) -> None:
    name, energy = vector.key.tensor, float(change_of(vector).square().sum())
    if energy != energy or energy == float("inf"):
        message = (
            f"'{name}' in {vector.tuned.file} or its base holds NaN or infinity: "
            f"repair the checkpoint, or leave it out with --exclude '{re.escape(name)}'."
        )
        raise NumericalError(message)
    if not energy:
        rest.unchanged.append(name)
        return
    whole = vector.tuned if vector.scaling is None else None
    beside = name.removesuffix(".bias") in inside
    reason = f"a {vector.key.role}: --extras {'bias' if beside else 'all'}"
    rest.leftovers.append(Leftover(name, vector.key.role, reason, energy, whole))
    if vector.key.role == "bias" and vector.rows is None:
        rest.biases[name] = partial(change_of, vector)


def _add_skipped(rest: Rest, sources: Sources, name: str, reason: str) -> None:
    """Add a tensor without a pair: its energy where both sides hold it in one shape after all."""
    tuned = getattr(sources.tuned, "tensors", {}).get(name)
    base = sources.base.tensors.get(name)
    if "tied to" in reason or tuned is None:
        return  # the same weight is listed under its other name; what only the base has did not change
    if base is None:
        rest.leftovers.append(Leftover(name, "other", reason, None, tuned))
    elif base.shape == tuned.shape and "--include" in reason:
        energy = None if base.scale or tuned.scale else _energy_between(base, tuned)
        if energy != 0.0:
            rest.leftovers.append(Leftover(name, "other", reason, energy, None))


def _energy_between(base: TensorSpec, tuned: TensorSpec) -> float:
    before, after = (read_tensor(spec).reshape(-1) for spec in (base, tuned))
    spans = (slice(start, start + CHUNK) for start in range(0, before.numel(), CHUNK))
    return sum(float((after[span].double() - before[span].double()).square().sum()) for span in spans)
