"""Plans and runs as plain data, for dry runs and for machines."""

from __future__ import annotations

from typing import Any

from deltaspec.pairing.plan import Plan
from deltaspec.store.run import Run
from deltaspec.store.trajectory import Trajectory
from deltaspec.types import LowRankSource


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row for each matrix that would be decomposed."""
    planned = [(key, shape, "attached") for key, shape in plan.attached]
    for pair in plan.pairs:
        kind = "factors" if isinstance(pair.tuned, LowRankSource) else pair.tuned.spec.dtype
        planned.append((pair.key, pair.shape, kind))
    rows = []
    for key, shape, kind in planned:
        place = {"role": key.role, "stack": key.stack, "depth": key.depth, "expert": key.expert}
        rows.append({"matrix": str(key), **place, "shape": f"{shape[0]}×{shape[1]}", "tuned": kind})
    return rows


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as one JSON object."""
    skipped, notes = [note.to_dict() for note in plan.skipped], [str(note) for note in plan.notes]
    found = {"family": plan.family, "pairs": plan_rows(plan), "skipped": skipped, "notes": notes}
    return {**found, "one_sided": plan.one_sided}


def run_to_json(run: Run) -> dict[str, Any]:
    """Return all that a run says as one JSON object."""
    return {
        "run": str(run.path),
        "manifest": run.manifest,
        "records": run.to_dicts(),
        "vectors": run.vectors,
        "failures": run.failures,
        "missing": run.missing,
    }


def trajectory_to_json(result: Trajectory) -> dict[str, Any]:
    """Return all that a trajectory says as one JSON object."""
    return {
        "trajectory": str(result.path),
        "checkpoints": result.manifest["checkpoints"],
        "steps": [{"step": s, **run_to_json(run)} for s, run in zip(result.steps, result.runs, strict=True)],
        "failures": result.failures,
        "missing": result.missing,
    }
