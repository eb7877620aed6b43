"""The two texts beside an adapter's weights: deltaspec.json, and the model card README.md."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.files.tensor_reader import list_tensors
from deltaspec.io.peft_targets import Layout
from deltaspec.types import AdapterModule

if TYPE_CHECKING:
    from deltaspec.workflows.extraction.nouns import Assembly, Leftover

FORMAT, VERSION = "deltaspec-adapter", 1
NOISY = 0.1  # share of ‖ΔW‖² from which rounding is spoken of


def write_report(
    assembly: Assembly,
    folder: Path,
    *,
    label: str,
    modules: Sequence[AdapterModule],
    full: Sequence[str],
    left: Sequence[Leftover],
    refused: dict[str, str],
) -> dict[str, Any]:
    """Write ``deltaspec.json`` and ``README.md`` into an adapter's folder, and return the former's content.

    Parameters
    ----------
    assembly : Assembly
    folder : Path
    label : str
        Which of the adapters.
    modules : sequence of AdapterModule
        As they were written.
    full : sequence of str
        Tensors that are stored whole.
    left : sequence of Leftover
        What this adapter does not carry.
    refused : dict
        Tensors that PEFT's matching by name would not keep apart, with the reason.
    """
    gone = {str(pair.key) for m in assembly.changed if m.path in refused for pair in m.pairs}
    matrices = [_flat(row, label) for key, row in assembly.rows.items() if row["energy"] and key not in gone]
    report = {
        "format": FORMAT,
        "version": VERSION,
        "deltaspec": version("deltaspec"),
        "label": label,
        **_provenance(assembly),
        "modules": {m.path: {"rank": m.rank, "kind": m.kind, "bias": _has_bias(m, refused)} for m in modules},
        "matrices": matrices,
        "whole": list(full),
        "unchanged": assembly.rest.unchanged,
        "not_carried": _rows(left, refused, _total(assembly)),
        "totals": _totals(assembly, matrices, folder, left),
        "grown": _grown(assembly, full),
        "tied": _tied(assembly, modules),
        "budget": assembly.spending.report[label] if assembly.spending else None,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "deltaspec.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(render_card(report), encoding="utf-8")
    return report


def _has_bias(module: AdapterModule, refused: dict[str, str]) -> bool:
    return module.read_bias is not None and f"{module.path}.bias" not in refused


def _provenance(assembly: Assembly) -> dict[str, Any]:
    sources, options = assembly.sources, assembly.options
    return {
        **assembly.identity,
        "dtype": sources.dtype,
        "target": options.form.target,
        "notes": [str(note) for note in sources.plan.notes],
    }


def _tied(assembly: Assembly, modules: Sequence[AdapterModule]) -> list[str]:
    """Modules that share an embedding's weight, and so hold its factors too."""
    layout = Layout(assembly.sources.base, assembly.sources.heads)
    paths = [layout.place(m.path)[0].name.removesuffix(".weight") for m in modules if m.kind == "embedding"]
    return [use for path in paths for use, _ in layout.uses(path)]


def _grown(assembly: Assembly, full: Sequence[str]) -> dict[str, int]:
    """Tensors stored whole with more rows than the base has, with their rows."""
    tensors = {name: spec for name, spec in getattr(assembly.sources.tuned, "tensors", {}).items() if name in full}
    base = assembly.sources.base.tensors
    return {n: s.shape[0] for n, s in tensors.items() if n in base and s.shape[:1] > base[n].shape[:1]}


def _flat(row: dict[str, Any], label: str) -> dict[str, Any]:
    """One matrix's row with its results for one adapter."""
    kept = {name: value for name, value in row.items() if name not in ("results", "wanted", "seconds")}
    return {**kept, **row["results"][label]}


def _total(assembly: Assembly) -> float:
    rest = sum(item.energy or 0.0 for item in assembly.rest.leftovers)
    return float(rest + sum(row["energy"] for row in assembly.rows.values()))


def _rows(left: Sequence[Leftover], refused: dict[str, str], total: float) -> list[dict[str, Any]]:
    rows = []
    for item in sorted(left, key=lambda item: -(item.energy or 0.0)):
        share = item.energy / total if item.energy is not None and total else None
        reason = refused.get(item.name, item.reason)
        rows.append({"tensor": item.name, "role": item.role, "share": share, "reason": reason})
    return rows


def _totals(
    assembly: Assembly,
    matrices: Sequence[dict[str, Any]],
    folder: Path,
    left: Sequence[Leftover],
) -> dict[str, Any]:
    """Sum over all matrices; ``kept`` is the share of ‖Δ‖² of everything that changed, also beside the factors."""
    energy = sum(row["energy"] for row in matrices)
    lost = sum(row["energy"] * row["error"] ** 2 for row in matrices)
    best = sum(row["energy"] * row["optimum"] ** 2 for row in matrices)
    total = _total(assembly)
    gone = {item.name for item in left}
    whole = sum(item.energy or 0.0 for item in assembly.rest.leftovers if item.name not in gone)
    file = folder / "adapter_model.safetensors"
    factors = [t for name, t in list_tensors(file)[0].items() if ".lora_" in name and not name.endswith(".bias")]
    parameters = sum(math.prod(factor.shape) for factor in factors)
    return {
        "matrices": len(matrices),
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "energy": energy,
        "error": math.sqrt(lost / energy) if energy else 0.0,
        "optimum": math.sqrt(best / energy) if energy else 0.0,
        "share_in_matrices": energy / total if total else 0.0,
        "kept": (energy - lost + whole) / total if total else 1.0,
    }


def render_card(report: dict[str, Any]) -> str:
    """Return an adapter's model card as Markdown with the hub's header."""
    totals, base = report["totals"], report["base"]["ref"]
    ranks = sorted({module["rank"] for module in report["modules"].values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
    lines = [
        "---",
        "library_name: peft",
        *([f"base_model: {json.dumps(base)}"] if not Path(base).exists() else []),
        "tags:",
        "- lora",
        "- deltaspec",
        "---",
        "",
        *_origin(report),
        f"by deltaspec {report['deltaspec']} ({report['label']}): rank {shown},",
        f"{totals['parameters']:,} parameters in {report['dtype']}, {totals['bytes'] / 1e6:.1f} MB.",
        "",
        "| | |",
        "|---|---|",
        f"| relative error ‖ΔW - BA‖/‖ΔW‖ over all matrices | {totals['error']:.4f} |",
        f"| the best possible at these ranks | {totals['optimum']:.4f} |",
        f"| share of the whole change ‖Δ‖² that the adapter keeps | {100 * totals['kept']:.2f} % |",
        "",
        "```python",
        "from peft import PeftModel",
        "model = PeftModel.from_pretrained(base_model, path_of_this_folder)",
        "```",
        "",
        *_advice(report),
    ]
    if report["not_carried"]:
        lines += ["## Not carried", "", "| tensor | share of ‖Δ‖² | why |", "|---|---|---|"]
        for row in report["not_carried"]:
            share = "-" if row["share"] is None else f"{100 * row['share']:.3g} %"
            lines.append(f"| `{_cell(row['tensor'])}` | {share} | {_cell(row['reason'])} |")
        lines.append("")
    return "\n".join([*lines, "`deltaspec.json` has every matrix with its rank and error.", ""])


def _origin(report: dict[str, Any]) -> list[str]:
    """Say what the adapter was made from: a title, and the beginning of a sentence."""
    base = report["base"]["ref"]
    if "adapters" not in report:
        title = f"# {_name(report['tuned']['ref'])} as a LoRA adapter of {_name(base)}"
        return [title, "", "Extracted from the full fine-tune"]
    terms = [f"{row['weight']:g} × {_name(row['ref'])}" for row in report["adapters"]]
    return [f"# LoRA adapter of {_name(base)}", "", f"The sum {' + '.join(terms)}, recompressed"]


def _name(ref: str) -> str:
    """Name a source: hub ids as they are, paths by their last part."""
    return _cell(Path(ref).resolve().name if Path(ref).exists() else ref)


def _cell(text: str) -> str:
    """Escape what would break a table: names come from files."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean.replace("|", "\\|").replace("`", "'")


def _advice(report: dict[str, Any]) -> list[str]:
    """Say what has to be known to load or to trust it."""
    ranks, lines = [module["rank"] for module in report["modules"].values()], []
    if report["target"] == "vllm" and ranks:
        lines += [f"Serve with `--enable-lora --max-lora-rank` of at least {max(ranks)}.", ""]
    elif report["target"] == "peft" and len(set(ranks)) > 1:
        lines += ["Ranks differ by module (rank_pattern): vLLM and llama.cpp ignore that; use PEFT.", ""]
    grown = [row["tensor"] for row in report["not_carried"] if row["reason"] == "rows that the base lacks"]
    if grown:
        lines += [f"The vocabulary grew: {', '.join(f'`{_cell(name)}`' for name in grown)} are not in the adapter.", ""]
    if report["tied"]:
        lines += [
            f"{', '.join(f'`{_cell(name)}`' for name in report['tied'])} shares the embedding's weight and holds its "
            "factors too. Do not call `merge_and_unload`: PEFT would add them twice; `deltaspec merge` adds them once.",
            "",
        ]
    if report["grown"]:
        rows = max(report["grown"].values())
        lines += [f"Before loading: `base_model.resize_token_embeddings({rows})`, for the vocabulary grew.", ""]
    shares = [row for row in report["matrices"] if (row.get("rounding_share") or 0.0) > NOISY]
    if shares:
        lines += [
            f"In {len(shares)} of {len(report['matrices'])} matrices storage rounding explains more than "
            f"{100 * NOISY:.0f} % of ‖ΔW‖²: their error counts rounding as change.",
            "",
        ]
    return lines
