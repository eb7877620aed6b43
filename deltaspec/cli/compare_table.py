"""The table of ``deltaspec compare``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaspec.cli.table import printable

HEADS = {
    "label": "method",
    "lr": "lr",
    "seed": "seed",
    "trainable": "trainable",
    "stored": "stored",
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
LEGEND = """learned: {metric} on held-out data ({before} before); forgotten: {kept}.
Medians over the matrices that changed: eff. rank; overlap: φ of the top right singular vectors of ΔW with full
fine-tuning's, and of random ones; amplif.: ‖ΔW‖/‖UᵀWV‖, and that of random directions. intruders (mean): of the first
10 left vectors of W + ΔW those unlike any of W, and those for the same σ in random directions: compare the two."""


def render_comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows of a comparison out, and say what they mean."""
    lines = [[HEADS[name] for name in HEADS], *([_cell(name, row[name]) for name in HEADS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    first = rows[0]
    kept = {"perplexity": "perplexity gained on other data", None: "not measured"}
    legend = LEGEND.format(
        metric=first["metric"],
        before=_cell("learned", first["learned_before"]),
        kept=kept.get(first["kept_metric"], "accuracy lost by a probe on other data"),
    )
    return "\n".join([*(line.rstrip() for line in shown), "", legend])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("trainable", "stored"):
        return f"{value:,}"
    if name == "peak_memory":
        return f"{value / 2**20:,.0f} MiB"
    if name in ("learned", "forgotten"):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))
