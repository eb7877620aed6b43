"""Modules that are tied to an embedding: they hold its factors too, and the same ones."""

from __future__ import annotations

import torch

from deltaspec.io.matrix import read_low_rank
from deltaspec.linalg.lowrank import svd_of_product
from deltaspec.pairing.homes import factor_shape
from deltaspec.pairing.modules import group_modules
from deltaspec.types import LowRankSource, LowRankTerm, View
from deltaspec.workflows.verification.claims import Claims
from deltaspec.workflows.verification.trio import Trio

ALIKE = 1e-9  # of ‖BA‖: two modules tied to one weight store the same numbers


def check_tied(trio: Trio, claims: Claims) -> tuple[list[str], list[str]]:
    """Compare the factors of an embedding with those of every module that is tied to it.

    Returns
    -------
    worse : list of str
        Tensors of modules whose product is another than the embedding's.
    missing : list of str
        Those that have no factors.
    """
    worse, missing, held = [], [], trio.adapter.modules
    for paths in _tied_paths(trio, claims):
        named = {path: f"{path}.weight" if f"{path}.weight" in held else path for path in paths}  # or as a parameter
        there = [path for path in paths if named[path] in held]
        missing += [f"{path}.weight" for path in paths if path not in there] if there else []
        worse += [f"{path}.weight" for path in there[1:] if not _alike(held[named[there[0]]], held[named[path]])]
    return worse, missing


def name_tied(trio: Trio, claims: Claims) -> set[str]:
    """Name the tensors whose factors are those of an embedding that they are tied to."""
    running = trio.layout.running
    names = {f"{path}.weight" for paths in _tied_paths(trio, claims) for path in paths}
    return names | {running[name] for name in names if name in running}


def _tied_paths(trio: Trio, claims: Claims) -> list[list[str]]:
    """List, for each claimed embedding, the modules of the running model that its factors are written for."""
    layout, found = trio.layout, []
    for module in group_modules(trio.changed, trio.base, split_fused=False)[0]:
        claim = claims.matrices.get(str(module.pairs[0].key))
        if module.kind == "embedding" and claim and claim.rank:
            path = layout.place(module.path)[0].name.removesuffix(".weight")
            uses = [use for use in layout.holders(path) if layout.running.get(f"{use}.weight") not in claims.matrices]
            found.append(uses if layout.is_unread(path) else [path, *(use for use in uses if use != path)])
    return [paths for paths in found if len(paths) > 1]


def _alike(first: LowRankTerm, second: LowRankTerm) -> bool:
    if factor_shape(first) != factor_shape(second):
        return False
    one, other = (read_low_rank(LowRankSource((term,), View(factor_shape(term)))) for term in (first, second))
    size = svd_of_product(one.lora_B, one.lora_A)[1].norm()
    lora_B, lora_A = torch.cat([one.lora_B, -other.lora_B], dim=1), torch.cat([one.lora_A, other.lora_A])
    return bool(svd_of_product(lora_B, lora_A)[1].norm() <= ALIKE * size)
