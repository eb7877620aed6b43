"""The certificate of an adapter: what ``deltaspec.json`` says of its matrices, and of what it does not carry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from deltaspec.files.tensor_reader import list_tensors
from deltaspec.io.lay_out import lay_out
from deltaspec.store.formats.adapter import AdapterReport, AdapterTotals, FactorsRow, NotCarried
from deltaspec.store.formats.piece import FactorisedRow
from deltaspec.types import AdapterModule, NoteKind
from deltaspec.workflows.extraction.model_card import render_card
from deltaspec.workflows.extraction.nouns import Assembly, Leftover

FORMAT, VERSION = "deltaspec-adapter", 1


@dataclass(frozen=True, slots=True)
class Written:
    """One adapter as it was written.

    Attributes
    ----------
    label : str
        Which of the adapters.
    folder : Path
    modules : sequence of AdapterModule
    whole : sequence of str
        Tensors that are stored whole.
    left : sequence of Leftover
        What this adapter does not carry.
    refused : mapping
        Tensors that PEFT's matching by name would not keep apart, with the reason.
    """

    label: str
    folder: Path
    modules: Sequence[AdapterModule]
    whole: Sequence[str]
    left: Sequence[Leftover]
    refused: Mapping[str, str]


def write_report(assembly: Assembly, written: Written) -> AdapterReport:
    """Write ``deltaspec.json`` and ``README.md`` into an adapter's folder, and return the former's content."""
    report = _report(assembly, written)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (written.folder / "deltaspec.json").write_text(text, encoding="utf-8")
    grown = [row.name for row in _by_energy(written.left) if row.kind is NoteKind.GROWN]
    (written.folder / "README.md").write_text(render_card(report, cut_off=grown), encoding="utf-8")
    return report


def _report(assembly: Assembly, written: Written) -> AdapterReport:
    sources, options, refused = assembly.sources, assembly.options, written.refused
    gone = {str(pair.key) for m in assembly.changed if m.path in refused for pair in m.pairs}
    rows = [row for key, row in assembly.rows.items() if row["energy"] and key not in gone]
    matrices = [_flatten(row, written.label) for row in rows]
    return {
        "format": FORMAT,
        "version": VERSION,
        "deltaspec": version("deltaspec"),
        "label": written.label,
        **assembly.extraction.identity,
        "dtype": sources.dtype,
        "target": options.form.target,
        "attachment": lay_out(sources.base).attachment,
        "notes": [str(note) for note in sources.plan.notes],
        "modules": {m.path: {"rank": m.rank, "kind": m.kind, "bias": _has_bias(m, refused)} for m in written.modules},
        "matrices": matrices,
        "whole": list(written.whole),
        "unchanged": assembly.rest.unchanged,
        "not_carried": _list_left(written, _total(assembly)),
        "totals": _totals(assembly, matrices, written),
        "grown": _grown(assembly, written.whole),
        "tied": _tied(assembly, written.modules),
        "budget": assembly.spending.report[written.label] if assembly.spending else None,
        "one_sided": sources.plan.one_sided,
    }


def _has_bias(module: AdapterModule, refused: Mapping[str, str]) -> bool:
    return module.read_bias is not None and f"{module.path}.bias" not in refused


def _tied(assembly: Assembly, modules: Sequence[AdapterModule]) -> list[str]:
    """Modules that share an embedding's weight, and so hold its factors too."""
    layout = lay_out(assembly.sources.base, assembly.sources.heads)
    paths = [layout.place(m.path)[0].name.removesuffix(".weight") for m in modules if m.kind == "embedding"]
    return [use for path in paths for use, _ in layout.uses(path)]


def _grown(assembly: Assembly, whole: Sequence[str]) -> dict[str, int]:
    """Tensors stored whole with more rows than the base has, with their rows."""
    tensors = {name: spec for name, spec in getattr(assembly.sources.tuned, "tensors", {}).items() if name in whole}
    base = assembly.sources.base.tensors
    return {n: s.shape[0] for n, s in tensors.items() if n in base and s.shape[:1] > base[n].shape[:1]}


def _flatten(row: FactorisedRow, label: str) -> FactorsRow:
    """One matrix's row with its results for one adapter."""
    kept = {name: value for name, value in row.items() if name not in ("results", "wanted", "seconds")}
    return {**kept, **row["results"][label]}  # type: ignore[typeddict-item]


def _total(assembly: Assembly) -> float:
    rest = sum(item.energy or 0.0 for item in assembly.rest.leftovers)
    return float(rest + sum(row["energy"] for row in assembly.rows.values()))


def _by_energy(left: Iterable[Leftover]) -> list[Leftover]:
    return sorted(left, key=lambda item: -(item.energy or 0.0))


def _list_left(written: Written, total: float) -> list[NotCarried]:
    rows: list[NotCarried] = []
    for item in _by_energy(written.left):
        share = item.energy / total if item.energy is not None and total else None
        reason = written.refused.get(item.name, item.reason)
        rows.append({"tensor": item.name, "role": item.role, "share": share, "reason": reason})
    return rows


def _totals(assembly: Assembly, matrices: Sequence[FactorsRow], written: Written) -> AdapterTotals:
    energy = sum(row["energy"] for row in matrices)
    lost = sum(row["energy"] * row["error"] ** 2 for row in matrices)
    best = sum(row["energy"] * row["optimum"] ** 2 for row in matrices)
    total, gone = _total(assembly), {item.name for item in written.left}
    whole = sum(item.energy or 0.0 for item in assembly.rest.leftovers if item.name not in gone)
    file = written.folder / "adapter_model.safetensors"
    factors = [t for name, t in list_tensors(file)[0].items() if ".lora_" in name and not name.endswith(".bias")]
    return {
        "matrices": len(matrices),
        "parameters": sum(math.prod(factor.shape) for factor in factors),
        "bytes": file.stat().st_size,
        "energy": energy,
        "error": math.sqrt(lost / energy) if energy else 0.0,
        "optimum": math.sqrt(best / energy) if energy else 0.0,
        "share_in_matrices": energy / total if total else 0.0,
        "kept": (energy - lost + whole) / total if total else 1.0,
    }
