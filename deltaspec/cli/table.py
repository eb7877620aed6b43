"""Plain-text tables for stdout: the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.pairing.plan import Plan
    from deltaspec.store.run import Run
    from deltaspec.store.trajectory import Trajectory
    from deltaspec.types.identity import OneSidedBlocks

HEADS = {
    "relative_norm": "‖ΔW‖/‖W‖",
    "effective_rank": "eff. rank",
    "effective_rank_ratio": "of noise",
    "rank_90": "rank 90%",
    "rank_90_ratio": "of noise",
    "stable_rank": "stable",
    "rank_above_rounding": "> rounding",
    "rank_above_noise": "> noise",
}
SHARES = {"effective_rank_ratio", "rank_90_ratio"}
LEGEND = """Medians over matrices. eff. rank: exp of the entropy of σ/Σσ; rank 90%: directions that keep 90 % of ‖ΔW‖²;
of noise: the rank before it, over that of pure noise of the shape; stable: Σσ²/σ₁²; > rounding: σ above what storage
rounding explains; > noise: σ above dense noise of unknown size."""
ROUNDING = "* counts directions that storage rounding explains, in some of the matrices: read '> rounding' there."


def printable(text: str) -> str:
    """Escape control characters: tensor names are untrusted, and a terminal obeys them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cell(name: str, value: Any) -> str:
    """Render one value: shares as percent, norms in three digits, ranks as numbers of directions."""
    if value is None:
        return "-"
    if name in SHARES:
        return f"{100 * value:.0f}%"
    if name == "relative_norm":
        return f"{value:.3g}"
    if isinstance(value, float) and name.startswith("rank_") and value.is_integer():
        return str(int(value))  # the median of an even number of counts
    if isinstance(value, float):
        return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    return printable(str(value))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows out in columns: text to the left, numbers to the right; columns that say nothing are left out."""
    if not rows:
        return ""
    names = [n for n in rows[0] if n != "rounding" and any(row[n] not in ("", None) for row in rows)]
    if "spectrum_of" in names and {row["spectrum_of"] for row in rows} == {"delta"}:
        names.remove("spectrum_of")
    lines = [[HEADS.get(name, name) for name in names]]
    for row in rows:
        marked = row.get("rounding", ())
        lines.append([cell(name, row[name]) + ("*" if name in marked else "") for name in names])
    left = [all(isinstance(row[name], str | None) for row in rows) for name in names]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(w) if is_left else text.rjust(w) for text, w, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def warn_one_sided(rows: Sequence[OneSidedBlocks]) -> list[str]:
    """Write one line for each side that has blocks alone."""
    lines = []
    for row in rows:
        own, other = ("base", "tuned model") if row["side"] == "base" else ("tuned model", "base")
        several = row["blocks"] > 1
        lines.append(
            f"Warning: {row['blocks']} block{'s' if several else ''} of the {own} ({printable(row['example'])}"
            f"{', …' if several else ''}; {100 * row['share']:.3g} % of its parameters) without a counterpart in the "
            f"{other}: no number here counts {'them' if several else 'it'}."
        )
    return lines


def render_plan(plan: Plan) -> str:
    """Render what would be compared, and what would not."""
    from deltaspec.workflows.analysis.as_json import plan_rows

    left_out = [f"Left out: {note.tensor} ({note})." for note in plan.skipped]
    said = [printable(line) for line in [*left_out, *(f"Note: {note}." for note in plan.notes)]]
    return "\n".join([table(plan_rows(plan)), *warn_one_sided(plan.one_sided), *said])


def render(run: Run, view: str = "role") -> str:
    """Render a run's table by role, depth or matrix, then what was left out and what failed."""
    from deltaspec.workflows.analysis.summary import VIEWS, vectors_by_role

    rows = VIEWS[view](run.records)
    parts = [table(rows)] if rows else ["No matrix has a result."]
    if view == "role":
        by_depth = VIEWS["depth"](run.records)
        parts += [table(by_depth)] if by_depth else []
        parts += [table(vectors_by_role(run))] if run.vectors else []
    if rows:
        parts.append(LEGEND)
    if any(row["rounding"] for row in rows):
        parts.append(ROUNDING)
    return "\n\n".join([*parts, *warn_one_sided(run.one_sided), *map(printable, _remarks(run))])


STEPS = ("relative_norm", "rank_90", "rank_90_ratio", "effective_rank", "effective_rank_ratio")
STEPS_LEGEND = """Medians over matrices. rank 90%: directions that keep 90 % of ‖ΔW‖²; eff. rank: exp of the entropy of
σ/Σσ; of noise: the rank before it, over that of pure noise of the shape."""


def render_steps(trajectory: Trajectory, view: str = "role") -> str:
    """Render a trajectory's table, rank against training step, then what failed."""
    from deltaspec.workflows.analysis.summary import COLUMNS, by_step

    found = by_step(trajectory, view)
    rows = [
        {n: row[n] for n in (*(n for n in row if n not in (*COLUMNS, "rounding")), *STEPS, "rounding")} for row in found
    ]
    parts = [table(rows), STEPS_LEGEND] if rows else ["No matrix has a result."]
    if any(row["rounding"] for row in rows):
        parts.append(ROUNDING)
    parts += [note] if (note := _describe_vectors(trajectory)) else []
    said = [f"Failed: step {step}: {message}" for step, message in trajectory.failures.items()]
    for step, run in zip(trajectory.steps, trajectory.runs, strict=True):
        said += [f"Failed: step {step}: {message}" for message in run.failures.values()]
        if run.missing:
            said.append(f"Unfinished: step {step} lacks {len(run.missing)} matrices; run the same command to go on.")
    said += [
        f"Unfinished: step {step} has no result yet; run the same command to go on." for step in trajectory.missing
    ]
    alone = {line: None for run in trajectory.runs for line in warn_one_sided(run.one_sided)}
    return "\n\n".join([*parts, *alone, *map(printable, said)])


def _describe_vectors(trajectory: Trajectory) -> str:
    """Say where a training changed vectors alone: their table says nothing; "" where matrices changed too."""
    if any(record.metrics["frobenius_norm"] for run in trajectory.runs for record in run.records):
        return ""
    changed: dict[str, set[str]] = {}
    for run in trajectory.runs:
        for row in run.vectors:
            if row["unchanged_fraction"] not in (None, 1):
                changed.setdefault(row["role"], set()).add(row["tensor"])
    said = ", ".join(f"{len(names)} of role {role}" for role, names in changed.items())
    return f"No matrix changed, only vectors: {said}; deltaspec show of a step's folder lists them." if said else ""


def _remarks(run: Run) -> list[str]:
    """Say what was left out, assumed, odd, failed or not finished."""
    from deltaspec.workflows.analysis.summary import describe_oddity, skipped_by_reason

    parts = [note] if (note := describe_oddity(run.records)) else []
    for reason, names in skipped_by_reason(run):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts.append(f"Left out: {shown} ({reason}).")
    notes = run.manifest.get("notes", [])
    parts += [f"Note: {note}." for note in notes[:5]]
    if len(notes) > 5:
        parts.append(f"Note: {len(notes) - 5} more notes in {run.path / 'manifest.json'}.")
    parts += [f"Failed: {message}" for message in run.failures.values()]
    if run.missing:
        parts.append(
            f"Unfinished: {len(run.missing)} matrices have no result yet; run the same analyze command to go on."
        )
    return parts
