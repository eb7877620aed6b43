"""Two checkpoints → a run directory of spectra and metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from deltaspec.errors import PairingError
from deltaspec.io.fingerprint import identify_source
from deltaspec.io.foreign_marks import describe_module
from deltaspec.io.intact import refuse_partial
from deltaspec.io.open import open_plain, open_source
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter, pair_adapters
from deltaspec.pairing.dense import pair_checkpoints
from deltaspec.pairing.flattened import take_component
from deltaspec.pairing.plan import Plan, refuse_empty, refuse_shapes
from deltaspec.pairing.renamed import choose_names, map_names
from deltaspec.store.formats.run import RunContent
from deltaspec.store.run import Run
from deltaspec.types import AdapterIndex, Checkpoint, ForeignAdapter, LowRankSource, Note, NoteKind, Opened, Step
from deltaspec.workflows.analysis.stored_matrix import Task, analyze_matrix, memory_of
from deltaspec.workflows.shared.fill_run import Execution, fill_run
from deltaspec.workflows.shared.opened_base import Base
from deltaspec.workflows.shared.run_names import default_path, describe_environment, writing
from deltaspec.workflows.shared.vector_changes import compare_vectors


def make_plan(base: str | Path, tuned: str | Path, options: AnalyzeOptions) -> tuple[Plan, Opened, Opened]:
    """Open both sides and pair them whole; reads headers alone (and embeddings, to see whether they are tied).

    Parameters
    ----------
    base, tuned : str or Path
        A folder, a file, or a hub id with @revision; an adapter folder on the tuned side or on both.
    options : AnalyzeOptions

    Raises
    ------
    CheckpointError, PairingError
        If a side cannot be read, or the two do not belong together.
    """
    first, (second,) = open_plain(base), choose_names([open_plain(tuned)], options.pairing)
    plan = pair_sources(first, second, options)
    refuse_shapes(plan.heads, vocabulary=False)
    return plan, first, second


def plan_analysis(base: Base, tuned: str | Path, options: AnalyzeOptions) -> Plan:
    """Say what ``analyze`` would compare; reads no weights of the base, and headers of the tuned side.

    Parameters
    ----------
    base : Base
    tuned : str or Path
        As of ``analyze``. An adapter that is not plain LoRA is read, and attached to the base without weights.
    options : AnalyzeOptions

    Raises
    ------
    DeltaspecError
        As of ``analyze``.
    """
    (second,) = take_component([open_source(tuned)], options.pairing.component)
    if isinstance(second, ForeignAdapter):
        from deltaspec.workflows.analysis.attached_adapter import (
            plan_attached,  # training's rooms load for such adapters only
        )

        return plan_attached(base, second, options)
    (mapped,) = map_names([second], options.pairing.map)
    return pair_sources(base.source, mapped, options)


def pair_sources(first: Opened, second: Opened, options: AnalyzeOptions) -> Plan:
    """Pair two sides that are open.

    Raises
    ------
    PairingError
        If the two do not belong together.
    OptionError
        If the first is an adapter that lacks the component that is asked for.
    CheckpointError
        If one side stores empty, or as integers, what the other has whole.
    """
    refuse_partial(first, second)
    if isinstance(first, AdapterIndex):
        if isinstance(second, Checkpoint):
            message = f"The base {first.ref} is an adapter and {second.ref} a full checkpoint: swap the two arguments."
            raise PairingError(message)
        (first,) = take_component([first], options.pairing.component)
        plan = pair_adapters(first, second, options)
    elif isinstance(second, AdapterIndex):
        plan = pair_adapter(first, second, options)
    else:
        if (what := describe_module(second.tensors)) and not describe_module(first.tensors):
            message = f"Cannot compare {first.ref} with {second.ref}: the second is {what}."
            raise PairingError(message)
        plan = pair_checkpoints(first, second, options)
    refuse_empty(plan, first, second)
    plan.notes[:0] = [Note(NoteKind.REMARK, text) for side in (first, second) for text in _remarks(side)]
    return plan


def _remarks(side: Opened) -> tuple[str, ...]:
    """Say what the numbers of one side are not, or leave out."""
    if isinstance(side, Checkpoint):
        return side.notes
    return (f"{side.ref} is {side.conditional}: what follows is its change there",) if side.conditional else ()


def analyze(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    options: AnalyzeOptions | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Run:
    """Decompose the change of every weight matrix between two checkpoints, and store what it says.

    Parameters
    ----------
    base, tuned : str or Path
        A folder, a file, or a hub id with @revision; an adapter folder on the tuned side or on both. LoRA adapters
        are read off their files; those of other methods, and DoRA, are attached to the running base.
    out : str or Path, optional
        The run directory; by default one under ``runs`` named after both sides. An unfinished one goes on where it
        stopped, a finished one is returned as it is.
    options : AnalyzeOptions, optional
    progress : callable, optional
        Called with a Step after each matrix.

    Returns
    -------
    Run
        With one record for each matrix and spectrum; matrices that failed are in ``run.failures``, blocks that only
        one side has in ``run.one_sided``.

    Raises
    ------
    DeltaspecError
        If a side cannot be read, the two do not pair, or the run directory belongs to something else.
    """
    return analyze_against(Base(base), tuned, out, Execution(options or AnalyzeOptions(), progress))


def analyze_against(base: Base, tuned: str | Path, out: str | Path | None, execution: Execution) -> Run:
    """Do what ``analyze`` does, with a base that is open; of an adapter, the base's norms are kept for the next.

    Parameters
    ----------
    base : Base
    tuned, out
        As of ``analyze``.
    execution : Execution
    """
    options = execution.options
    (second,) = take_component([open_source(tuned)], options.pairing.component)
    if isinstance(second, ForeignAdapter):
        from deltaspec.workflows.analysis.attached_adapter import (
            analyze_attached,  # training's rooms load for such adapters only
        )

        run = analyze_attached(base, second, out, execution)
        _keep_norms(
            base.running_norms, run, {record.store_key for record in run.records if record.spectrum_of == "delta"}
        )
        return run
    (second,) = map_names([second], options.pairing.map)
    plan = pair_sources(base.source, second, options)
    tasks = _make_tasks(plan, options)
    manifest = _manifest(plan, base.source, second, options, tasks)
    run = Run.create_or_resume(out or default_path(manifest["base"], manifest["tuned"], manifest["options"]), manifest)
    with writing(run):
        compare_vectors(plan, run)
        compute = partial(analyze_matrix, options=options, norms=dict(base.norms))
        fill_run(run, tasks, compute, cost=partial(memory_of, options=options), execution=execution)
    finished = Run.load(run.path)
    _keep_norms(base.norms, finished, {str(pair.key) for pair in plan.pairs if isinstance(pair.tuned, LowRankSource)})
    return finished


def _keep_norms(norms: dict[str, float], run: Run, keys: set[str]) -> None:
    """Keep ‖W‖ of the base's matrices, by key: nothing else of an adapter's analysis reads the base."""
    for record in run.records if keys else ():
        norm = record.metrics.get("base_norm")
        if record.store_key in keys and norm is not None:
            norms[record.store_key] = float(norm)


def _manifest(plan: Plan, base: Opened, tuned: Opened, options: AnalyzeOptions, tasks: list[Task]) -> RunContent:
    return {
        "base": identify_source(base),
        "tuned": identify_source(tuned),
        "options": options.identity(),
        **describe_environment(),
        "family": plan.family,
        "notes": [str(note) for note in plan.notes],
        "skipped": [note.to_dict() for note in plan.skipped],
        "planned": [task.store_key for task in tasks],
        "one_sided": plan.one_sided,
    }


def _make_tasks(plan: Plan, options: AnalyzeOptions) -> list[Task]:
    """One task for each pair and spectrum; a side that is stored as factors has no spectrum of its own."""
    tasks = {}
    for pair in plan.pairs:
        for of in options.spectra:
            task = Task(pair, of)
            if of != "delta" and isinstance(pair.base if of == "base" else pair.tuned, LowRankSource):
                reason = "stored as factors alone: analyse the merged checkpoint for it"
                plan.skip(task.store_key, NoteKind.FACTORS, reason)
            elif task.store_key in tasks:
                message = f"Two matrices would be stored as '{task.store_key}': leave one out with --exclude."
                raise PairingError(message)
            else:
                tasks[task.store_key] = task
    return list(tasks.values())
