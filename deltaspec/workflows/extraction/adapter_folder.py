"""Finished factors → adapter folders: what goes in, at which rank, and the report of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deltaspec.extraction.factors import block_diagonal, pad
from deltaspec.files.dtypes import OPTIONS
from deltaspec.io.matrix import read_tensor
from deltaspec.io.peft_writer import PeftForm, write_adapter
from deltaspec.store.formats.adapter import AdapterReport
from deltaspec.types import AdapterModule, Entry, MatrixSource, ModulePair, WeightPair
from deltaspec.workflows.extraction.certificate import Written, write_report
from deltaspec.workflows.extraction.factorise_matrix import name_factors
from deltaspec.workflows.extraction.nouns import Assembly, Leftover
from deltaspec.workflows.extraction.servers import SERVERS


def write_adapters(assembly: Assembly, folder: Path) -> dict[str, AdapterReport]:
    """Write one adapter into ``folder``, or one for each label into folders of their names; return the reports."""
    labels = assembly.options.ranks.labels()
    reports = {}
    for label in labels:
        place = folder if len(labels) == 1 else folder / label
        place.mkdir(parents=True, exist_ok=True)
        reports[label] = write_report(assembly, _write_one(assembly, place, label))
    return reports


def _write_one(assembly: Assembly, folder: Path, label: str) -> Written:
    """Write one adapter's weights and config, and say what is in it."""
    form = assembly.options.form
    with_bias = form.extras in ("bias", "all")
    ranks = _stored_ranks(assembly, label)
    if server := SERVERS.get(form.target):
        server.max_lora_rank(max(ranks.values(), default=1))
    modules = [_module(assembly, m, label, rank=ranks[m.path], with_bias=with_bias) for m in assembly.changed]
    modules += _bias_only(assembly, ranks) if with_bias else []
    modules = [module for module in modules if module.rank]
    full = _whole_entries(assembly) if form.extras == "all" else []
    sources = assembly.sources
    stored_as = PeftForm(sources.dtype, form.rslora, sources.heads, assembly.extraction.loader or {})
    refused = write_adapter(folder, modules, full, base=sources.base, form=stored_as)
    carried = {m.path for m in modules if m.read_bias and f"{m.path}.bias" not in refused and m.path not in refused}
    stored = {entry.name for entry in full} - refused.keys()
    left = [item for item in assembly.rest.leftovers if not _is_carried(item, carried, stored)]
    left += [_without(assembly, m, refused[m.path]) for m in assembly.changed if m.path in refused]
    left += [_without(assembly, m, "the policy gives it no direction") for m in assembly.changed if not ranks[m.path]]
    modules = [module for module in modules if module.path not in refused]
    return Written(label, folder, modules, sorted(stored), left, refused)


def _without(assembly: Assembly, module: ModulePair, reason: str) -> Leftover:
    energy = sum(assembly.rows[str(pair.key)]["energy"] for pair in module.pairs)
    return Leftover(module.name, module.pairs[0].key.role, reason, energy)


def _is_carried(item: Leftover, biases: set[str], stored: set[str]) -> bool:
    return item.name in stored or (item.role == "bias" and item.name.removesuffix(".bias") in biases)


def _stored_ranks(assembly: Assembly, label: str) -> dict[str, int]:
    """Each module's rank in the file: one for all where the target or the policy wants one, else its own."""
    own, parts = {}, False
    for module in assembly.changed:
        rows = assembly.rows
        found = [[rows[str(pair.key)]["results"][label]["rank"] for pair in whole] for whole in module.wholes()]
        parts = parts or any(len(ranks) > 1 for ranks in found)
        own[module.path] = max(map(sum, found))
    one = assembly.options.form.target != "peft" or (assembly.options.ranks.policy == "rank" and not parts)
    return dict.fromkeys(own, max(own.values(), default=0)) if one else own


def _module(assembly: Assembly, module: ModulePair, label: str, *, rank: int, with_bias: bool) -> AdapterModule:
    bias = assembly.rest.biases.get(f"{module.path}.bias") if with_bias and module.kind != "stack" else None
    return AdapterModule(
        module.path,
        module.kind,
        module.shape,
        rank,
        partial(_read, assembly, module, label),
        kernel=module.kernel,
        experts=module.experts,
        read_bias=bias,
        transposed=module.transposed,
    )


def _bias_only(assembly: Assembly, ranks: dict[str, int]) -> list[AdapterModule]:
    """Modules whose bias alone changed: factors of zeros carry it."""
    paths = {module.path for module in assembly.changed}
    found = []
    for module in assembly.sources.modules:
        bias = assembly.rest.biases.get(f"{module.path}.bias")
        if bias and module.path not in paths and module.kind in ("linear", "conv1d", "conv"):
            empty = torch.zeros(0, module.shape[1]), torch.zeros(module.shape[0], 0)
            rank = min(ranks.values(), default=1) or 1
            read = partial(_constant, empty)
            found.append(AdapterModule(module.path, module.kind, module.shape, rank, read, module.kernel, 0, bias))
    return found


def _constant(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return factors


def _read(assembly: Assembly, module: ModulePair, label: str) -> tuple[Tensor, Tensor]:
    """Read a module's factors from its pieces, joined where it is fused or a stack."""
    wholes = [_read_whole(assembly, module, pairs, label) for pairs in module.wholes()]
    if module.kind == "stack":
        rank = max(a.shape[0] for a, _ in wholes)
        padded = [pad(a, b, rank) for a, b in wholes]
        return torch.stack([a for a, _ in padded]), torch.stack([b for _, b in padded])
    lora_A, lora_B = wholes[0]
    if lora_B.shape[0] < module.shape[0]:  # a vocabulary that shrank: rows that only the base has stay as they are
        lora_B = torch.cat([lora_B, lora_B.new_zeros(module.shape[0] - lora_B.shape[0], lora_B.shape[1])])
    return lora_A, lora_B


def _read_whole(assembly: Assembly, module: ModulePair, pairs: list[WeightPair], label: str) -> tuple[Tensor, Tensor]:
    """Read the factors of one whole matrix, block-diagonal where they are those of its parts."""
    dtype, (rows, columns) = OPTIONS[assembly.sources.dtype].torch, module.shape
    found, (name_A, name_B) = [], name_factors(label)
    for pair in pairs:
        tensors = assembly.pieces.tensors(str(pair.key))
        lora_A = tensors.get(name_A, torch.zeros(0, pair.shape[1], dtype=dtype))
        found.append((lora_A, tensors.get(name_B, torch.zeros(pair.shape[0], 0, dtype=dtype))))
    if len(pairs) == 1 and not pairs[0].key.part:
        return found[0]
    if not pairs:
        return torch.zeros(0, columns, dtype=dtype), torch.zeros(rows, 0, dtype=dtype)
    places = [pair.base.view.take(torch.arange(rows)) for pair in pairs]
    return block_diagonal([(a, b, at) for (a, b), at in zip(found, places, strict=True)], rows=rows)


def _whole_entries(assembly: Assembly) -> list[Entry]:
    """Tensors that changed and have no factors, with the other tensors of their modules, as modules_to_save stores.

    Left out are tensors with scales, which only their module could read, and what lies beside factors in one module.
    """
    plan, modules = assembly.sources.plan, assembly.sources.modules
    stored = {item.name: item.whole for item in assembly.rest.leftovers if item.whole is not None}
    known = {vector.key.tensor: vector.tuned for vector in plan.vectors if vector.scaling is None}
    known |= {p.key.tensor: p.tuned.spec for p in plan.pairs if isinstance(p.tuned, MatrixSource)}
    wanted = {name.rpartition(".")[0] for name in stored}
    wanted -= {path for path in wanted if any(f"{module.path}.".startswith(f"{path}.") for module in modules)}
    chosen = {name: spec for name, spec in (known | stored).items() if name.rpartition(".")[0] in wanted}
    return [
        Entry(name, spec.shape, spec.dtype, partial(read_tensor, spec))
        for name, spec in chosen.items()
        if spec.scale is None
    ]
