"""Pairs of matrices → the modules that an adapter changes: fused parts and stacked experts belong together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from deltaspec.architecture.roles import fused_role
from deltaspec.pairing.plan import Plan
from deltaspec.types import Checkpoint, LowRankSource, MatrixSource, ModulePair, Shape, WeightPair

EMBEDDINGS = {"embed", "token_type_embed", "position_embed"}
IN_BLOCKS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}


def group_modules(plan: Plan, base: Checkpoint, *, split_fused: bool) -> tuple[list[ModulePair], dict[str, str]]:
    """Join a plan's pairs by the tensor of the base that holds them.

    Parameters
    ----------
    plan : Plan
        Checkpoint or adapter against ``base``.
    base : Checkpoint
    split_fused : bool
        Keep the parts of a fused matrix apart.

    Returns
    -------
    modules : list of ModulePair
        In the plan's order. Parts are joined to one matrix where both sides hold them in one tensor.
    left : dict
        Tensor → why no adapter can hold factors for it.
    """
    groups: defaultdict[str, list[WeightPair]] = defaultdict(list)
    for pair in plan.pairs:
        groups[_home(pair)].append(pair)
    modules, left = [], {}
    for name, pairs in groups.items():
        reason = _why_not(name, pairs)
        if reason:
            left[name] = reason
        else:
            modules.append(_module(name, pairs, base, split_fused=split_fused))
    return modules, left


def _home(pair: WeightPair) -> str:
    """Name the base's tensor that holds a pair; a key may carry a head's name that the base does not store."""
    if pair.key.role == "lm_head" and isinstance(pair.base, MatrixSource):
        return pair.key.tensor
    return pair.base.spec.name if isinstance(pair.base, MatrixSource) else pair.key.tensor


def _why_not(name: str, pairs: list[WeightPair]) -> str:
    key, base = pairs[0].key, pairs[0].base
    if isinstance(base, LowRankSource):
        return ""
    if base.view.expert is None and not name.endswith(".weight"):
        return "a bare parameter: adapters hold factors for modules and for stacks of experts"
    if key.role == "norm":
        return "a normalisation: --extras all stores it whole"
    return ""


def _module(name: str, pairs: list[WeightPair], base: Checkpoint, *, split_fused: bool) -> ModulePair:
    first = pairs[0]
    path = name.removesuffix(".weight")
    if isinstance(first.base, LowRankSource):
        return ModulePair(name, path, "linear", first.shape, tuple(pairs))
    shape, view = first.base.spec.shape, first.base.view
    if view.expert is not None:
        experts: defaultdict[int, list[WeightPair]] = defaultdict(list)
        for pair in pairs:
            experts[pair.base.view.expert or 0].append(pair)
        joined = tuple(p for e in sorted(experts) for p in _join(experts[e], base))
        height = (shape[2], shape[1]) if view.transposed else (shape[1], shape[2])
        return ModulePair(name, path, "stack", height, joined, transposed=view.transposed, experts=shape[0])
    kind: str = "linear"
    kernel: Shape = ()
    if len(shape) > 2:
        kind, kernel = "conv", shape[1:]
    elif first.key.role in EMBEDDINGS and not path.endswith("proj"):
        kind = "embedding"
    elif view.transposed:
        kind = "conv1d"
    whole = (shape[1], shape[0]) if view.transposed else (shape[0], first.shape[1])
    return ModulePair(name, path, kind, whole, tuple(pairs) if split_fused else _join(pairs, base), kernel)


def _join(pairs: list[WeightPair], base: Checkpoint) -> tuple[WeightPair, ...]:
    """Make one pair of all parts of a tensor, where the tuned side too holds them all in one tensor."""
    first = pairs[0]
    if len(pairs) == 1 or not isinstance(first.base, MatrixSource):
        return tuple(pairs)
    tuned = {_stored(pair) for pair in pairs}
    rows = sum(pair.shape[0] for pair in pairs)
    stored = base.tensors[first.base.spec.name].shape
    height = stored[1:] if first.base.view.expert is not None else stored
    if len(tuned) > 1 or rows != height[1 if first.base.view.transposed else 0]:
        return tuple(pairs)
    whole = (rows, first.shape[1])
    sides = []
    for side in (first.base, first.tuned):
        view = replace(side.view, shape=whole, groups=1, start=0, stop=None)
        sides.append(replace(side, view=view))
    key = replace(first.key, part="", role=fused_role((pair.key.role for pair in pairs), otherwise=first.key.role))
    return (WeightPair(key, whole, sides[0], sides[1], any(pair.guessed for pair in pairs)),)


def _stored(pair: WeightPair) -> object:
    return pair.tuned.spec if isinstance(pair.tuned, MatrixSource) else pair.tuned.terms


def grown_rows(pair: WeightPair) -> tuple[int, int] | None:
    """Return from which to which row only the tuned side of a vocabulary goes on; None where both have all rows."""
    if not isinstance(pair.tuned, MatrixSource) or pair.key.part or pair.tuned.view.expert is not None:
        return None
    view, rows = pair.tuned.view, pair.tuned.spec.shape[0]
    return (pair.shape[0], rows) if view.stop == pair.shape[0] < rows and not view.transposed else None
