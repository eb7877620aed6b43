"""What an extraction says on the terminal: errors by role, totals, and what the adapter does not carry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from deltaspec.architecture.roles import group_rare, order_roles
from deltaspec.cli.table import printable, table, warn_one_sided
from deltaspec.store.formats.adapter import AdapterReport, BudgetReport, FactorsRow

SHOWN = 8
INPUTS = """ on inputs: ‖(ΔW - BA)X‖/‖ΔW·X‖ over the inputs X of the calibration, which
the factors minimise."""


def render_reports(reports: Mapping[str, AdapterReport]) -> str:
    """Render each adapter's certificate."""
    return "\n\n".join(_render(report, title=len(reports) > 1) for report in reports.values())


def _render(report: AdapterReport, *, title: bool) -> str:
    totals = report["totals"]
    parts = [report["label"]] if title else []
    if report["matrices"]:
        parts.append(table(by_role(report["matrices"])))
        parts.append(
            "Medians over matrices. rank: directions kept; error: ‖ΔW - BA‖/‖ΔW‖ of the factors as stored; best: the "
            "least possible\nat this rank; worst: the largest error."
            + (INPUTS if any("weighted_error" in row for row in report["matrices"]) else "")
        )
    alone = report.get("one_sided", [])
    counted = " of what both models hold" if alone else ""
    parts.append(
        f"{totals['parameters']:,} parameters, {report['dtype']}, {totals['bytes'] / 1e6:.2f} MB. All matrices: error "
        f"{totals['error']:.4f}, best {totals['optimum']:.4f}. Kept of ‖Δ‖²{counted}: {100 * totals['kept']:.2f} %."
    )
    parts += warn_one_sided(alone) + _remarks(report)
    return "\n\n".join(parts)


def by_role(matrices: Sequence[FactorsRow]) -> list[dict[str, Any]]:
    """One row for each role: number of matrices, median rank, error and optimum, and the largest error."""
    groups: defaultdict[str, list[FactorsRow]] = defaultdict(list)
    shown = group_rare(Counter(row["role"] for row in matrices))
    for row in matrices:
        groups[shown[row["role"]]].append(row)
    rows = []
    for role in order_roles(groups):
        group = groups[role]
        rows.append(
            {
                "role": role,
                "matrices": len(group),
                "rank": median(row["rank"] for row in group),
                "error": _median(group, "error"),
                "best": _median(group, "optimum"),
                "worst": f"{max(row['error'] for row in group):.4f}",
                "on inputs": _median(group, "weighted_error"),
                "best on inputs": _median(group, "weighted_optimum"),
            }
        )
    return rows


def _median(group: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [row[name] for row in group if name in row]
    return f"{median(values):.4f}" if values else ""


def _say_budget(budget: BudgetReport) -> str:
    spent = f"Budget: {budget['spent']:,} of {budget['budget']:,} parameters"
    if budget["uniform"] is not None:
        return f"{spent}, at one rank for all."
    bound = 100 * (budget["loss_bound"] or 0.0)
    return f"{spent}; no allocation keeps more than {bound:.2g} % of ‖ΔW‖² beyond what this one keeps."


def _remarks(report: AdapterReport) -> list[str]:
    parts = []
    left = report["not_carried"]
    if left:
        share = sum(row["share"] or 0.0 for row in left)
        unknown = sum(row["share"] is None for row in left)
        beyond = f", and what {unknown} hold beyond the base" if unknown else ""
        lines = [f"Not carried: {len(left)} tensors, {100 * share:.3g} % of ‖Δ‖²{beyond}."]
        for row in left[:SHOWN]:
            part = "" if row["share"] is None else f"{100 * row['share']:.3g} %, "
            lines.append(f"  {printable(row['tensor'])} ({part}{printable(row['reason'])})")
        lines += [f"  and {len(left) - SHOWN} more, in deltaspec.json"] if len(left) > SHOWN else []
        parts.append("\n".join(lines))
    if report["unchanged"]:
        names = ", ".join(map(printable, report["unchanged"][:3]))
        more = f" and {len(report['unchanged']) - 3} more" if len(report["unchanged"]) > 3 else ""
        parts.append(f"Unchanged, and so left out: {names}{more}.")
    if report["whole"]:
        parts.append(f"Stored whole (modules_to_save): {len(report['whole'])} tensors.")
    if report["budget"]:
        parts.append(_say_budget(report["budget"]))
    if report["label"] == "above-rounding":
        whole = sum(row["rank"] == min(row["shape"]) for row in report["matrices"])
        parts += [f"In {whole} matrices rounding explains no direction, so all are kept."] if whole else []
    noisy = [row for row in report["matrices"] if (row.get("rounding_share") or 0.0) > 0.1]
    if noisy:
        parts.append(
            f"In {len(noisy)} of {len(report['matrices'])} matrices storage rounding explains more than 10 % of "
            "‖ΔW‖²: their error counts rounding as change (--above-rounding keeps what it does not explain)."
        )
    parts.append(f"attachment: {printable(report['attachment'])}")
    return [*parts, *(f"Note: {printable(note)}." for note in report["notes"][:5])]
