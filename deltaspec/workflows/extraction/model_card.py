"""The model card beside an adapter's weights: its README.md, with the hub's header."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from deltaspec.store.formats.adapter import AdapterReport
from deltaspec.workflows.extraction.servers import SERVERS, Server

NOISY = 0.1  # share of ‖ΔW‖² from which rounding is spoken of


def render_card(report: AdapterReport, *, cut_off: Sequence[str] = ()) -> str:
    """Return an adapter's model card as Markdown with the hub's header.

    Parameters
    ----------
    report : AdapterReport
    cut_off : sequence of str
        Rows of a vocabulary that the base lacks and the adapter does not carry, as ``not_carried`` names them.
    """
    totals = report["totals"]
    return "\n".join(
        [
            *_head(report),
            *_origin(report),
            f"by deltaspec {report['deltaspec']} ({report['label']}): rank {_ranks(report)},",
            f"{totals['parameters']:,} parameters in {report['dtype']}, {totals['bytes'] / 1e6:.1f} MB.",
            "",
            "| | |",
            "|---|---|",
            f"| relative error ‖ΔW - BA‖/‖ΔW‖ over all matrices | {totals['error']:.4f} |",
            f"| the best possible at these ranks | {totals['optimum']:.4f} |",
            f"| share of {_whole(report)} ‖Δ‖² that the adapter keeps | {100 * totals['kept']:.2f} % |",
            "",
            "```python",
            "from peft import PeftModel",
            "model = PeftModel.from_pretrained(base_model, path_of_this_folder)",
            "```",
            "",
            *_advise_loading(report, cut_off),
            *_advise_rounding(report),
            f"Whether every factor changes the module that it names when PEFT loads it: {_cell(report['attachment'])}.",
            "",
            *_list_left(report),
            "`deltaspec.json` has every matrix with its rank and error.",
            "",
        ]
    )


def _head(report: AdapterReport) -> list[str]:
    """Return the hub's header; a base that is a folder here is no name there."""
    name = _hub_name(report)
    named = [f"base_model: {json.dumps(name)}"] if name else []
    return ["---", "library_name: peft", *named, "tags:", "- lora", "- deltaspec", "---", ""]


def _whole(report: AdapterReport) -> str:
    """Name the change that shares are of: blocks that only one model has are in none."""
    rows = report.get("one_sided", [])
    names = {"base": "the base", "tuned": "the fine-tune"}
    alone = " and ".join(f"{row['blocks']} of {names[row['side']]} (`{_cell(row['example'])}` …)" for row in rows)
    return (
        f"the change of what both models hold (not counted: blocks that only one has, {alone})"
        if rows
        else ("the whole change")
    )


def _ranks(report: AdapterReport) -> str:
    ranks = sorted({module["rank"] for module in report["modules"].values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"


def _list_left(report: AdapterReport) -> list[str]:
    if not report["not_carried"]:
        return []
    lines = ["## Not carried", "", "| tensor | share of ‖Δ‖² | why |", "|---|---|---|"]
    for row in report["not_carried"]:
        share = "-" if row["share"] is None else f"{100 * row['share']:.3g} %"
        lines.append(f"| `{_cell(row['tensor'])}` | {share} | {_cell(row['reason'])} |")
    return [*lines, ""]


def _origin(report: AdapterReport) -> list[str]:
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


def _advise_serving(report: AdapterReport) -> list[str]:
    """Give the servers' own commands, or say what they make of an adapter that was written for PEFT."""
    ranks = [module["rank"] for module in report["modules"].values()]
    if report["target"] in SERVERS:
        return ["```sh", *_commands(SERVERS[report["target"]], report, max(ranks, default=1)), "```", ""]
    lines = []
    if len(set(ranks)) > 1:
        lines += [
            "Ranks differ by module (rank_pattern, alpha_pattern): PEFT follows them, and vLLM from 0.32 on; vLLM 0.31 "
            "and llama.cpp read one α for all, so that they would scale modules wrongly. For them write it with "
            "`--target vllm` or `--target llamacpp`.",
            "",
        ]
    form = report["options"].get("form")
    if isinstance(form, dict) and form.get("rslora"):
        lines += ["Its scale is α/√r (use_rslora), which llama.cpp ignores: it would scale every module wrongly.", ""]
    return lines


def _commands(server: Server, report: AdapterReport, rank: int) -> list[str]:
    """Fill in a server's commands."""
    name, _, revision = _hub_name(report).partition("@")
    base = shlex.join([name, *(["--revision", revision] if revision else [])]) if name else "path_of_the_base"
    values = {"BASE": _cell(base), "FOLDER": "path_of_the_base", "ADAPTER": "path_of_this_folder"}
    values["BOUND"] = str(server.max_lora_rank(rank))
    return [re.sub("[A-Z]{4,}", lambda word: values[word[0]], command) for command in server.commands]


def _hub_name(report: AdapterReport) -> str:
    """Name the base as the hub does, with its revision; "" where it is a folder here."""
    ref = report["base"]["ref"]
    return "" if Path(ref).exists() else ref


def _advise_loading(report: AdapterReport, cut_off: Sequence[str]) -> list[str]:
    """Say what has to be known to load it."""
    lines = _advise_serving(report)
    if cut_off:
        names = ", ".join(f"`{_cell(name)}`" for name in cut_off)
        lines += [f"The vocabulary grew: {names} are not in the adapter.", ""]
    if report["tied"]:
        lines += [
            f"{', '.join(f'`{_cell(name)}`' for name in report['tied'])} shares the embedding's weight and holds its "
            "factors too. Do not call `merge_and_unload`: PEFT would add them twice; `deltaspec merge` adds them once.",
            "",
        ]
    if report["grown"]:
        rows = max(report["grown"].values())
        lines += [f"Before loading: `base_model.resize_token_embeddings({rows})`, for the vocabulary grew.", ""]
    return lines


def _advise_rounding(report: AdapterReport) -> list[str]:
    """Say where the change is partly rounding."""
    noisy = [row for row in report["matrices"] if row.get("rounding_share", 0.0) > NOISY]
    if not noisy:
        return []
    return [
        f"In {len(noisy)} of {len(report['matrices'])} matrices storage rounding explains more than "
        f"{100 * NOISY:.0f} % of ‖ΔW‖²: their error counts rounding as change.",
        "",
    ]
