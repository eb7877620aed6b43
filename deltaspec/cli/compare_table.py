"""The table of ``deltaspec compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaspec.cli.table import printable

HEADS = {
    "label": "method",
    "lr": "lr",
    "seed": "seed",
    "trainable": "trainable",
    "head": "+ head",
    "stored": "stored",
    "learned_before": "before",
    "learned": "learned",
    "forgotten": "forgotten",
    "seconds_per_step": "s/step",
    "peak_memory": "peak",
    "effective_rank": "eff. rank",
    "overlap": "overlap",
    "overlap_null": "null",
    "intruders": "intruders",
    "intruders_null": "null",
    "amplification": "amplif.",
    "amplification_null": "null",
}
LEGEND = """learned: {metric} on held-out data, the base before; forgotten: {kept}.
Medians over the blocks' matrices that changed: eff. rank; overlap: φ of the top right singular vectors of ΔW with full
fine-tuning's, and of random ones; amplif.: ‖ΔW‖/‖UᵀWV‖ in ΔW's top directions, and in random ones.
intruders (mean): of the first 10 left vectors of W + ΔW those unlike any of W, and those for the same σ in random
directions: compare the two."""


def render_comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay the rows of a comparison out, and say what they mean."""
    lines = [[HEADS[name] for name in HEADS], *([_cell(name, row[name]) for name in HEADS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    kept = {"perplexity": "perplexity gained on other data", "accuracy": "accuracy lost by a probe on other data"}
    measured = next((row["kept_metric"] for row in rows if row["kept_metric"]), "")
    legend = LEGEND.format(metric=rows[0]["metric"], kept=kept.get(measured, "not measured"))
    return "\n".join([*(line.rstrip() for line in shown), "", legend])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("trainable", "head", "stored"):
        return f"{value:,}"
    if name == "peak_memory":
        return f"{value / 2**20:,.0f} MiB"
    if name in ("learned", "learned_before", "forgotten"):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))
