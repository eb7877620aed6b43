"""A model and data → a fine-tuned model by any method, with what it learned and what it forgot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deltaspec.errors import NumericalError, OptionError
from deltaspec.options.training import DataOptions, LoopOptions, RunOptions, TargetOptions
from deltaspec.store.training_folder import Folder
from deltaspec.training.loop.steps import Tick
from deltaspec.workflows.training.plan import Plan, Recipe, Sets, make_plan
from deltaspec.workflows.training.prepare_model import accelerated
from deltaspec.workflows.training.session import Training


def train(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    method: str = "lora",
    method_options: Mapping[str, Any] | None = None,
    targets: TargetOptions | None = None,
    data_options: DataOptions | None = None,
    loop: LoopOptions | None = None,
    run: RunOptions | None = None,
    eval_data: str | Path | None = None,
    forget: str | Path | None = None,
    forget_options: DataOptions | None = None,
    rates: Sequence[float] = (),
    overwrite: bool = False,
    progress: Callable[[Tick], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model into a training folder, or go on with one that was stopped.

    Parameters
    ----------
    model : str or Path
        A folder or a hub id with @revision, with config and tokenizer.
    data : str or Path
        A csv, tsv, json, jsonl, txt or parquet file, or a data set of the hub.
    out : str or Path
        The training folder: train.json, metrics.jsonl, checkpoints/, final/.
    method : str
        Its name in METHODS.
    method_options : mapping of str to value, optional
        Fields of the method's options.
    targets : TargetOptions, optional
        Which matrices it changes; the method's own by default.
    data_options : DataOptions, optional
    loop : LoopOptions, optional
    run : RunOptions, optional
    eval_data : str or Path, optional
        Data to evaluate on; without it a share of ``data`` is held out.
    forget : str or Path, optional
        Other data, on which is measured what is lost.
    forget_options : DataOptions, optional
        How they are read; like ``data`` by default.
    rates : sequence of float
        Learning rates to train with one after another, each in a folder of its own in ``out``, instead of ``loop.lr``.
    overwrite : bool
        Start again where ``out`` holds a training.
    progress : callable, optional
        Called with a Tick after each step.

    Returns
    -------
    dict
        What train.json holds.

    Raises
    ------
    DeltaspecError
        If model, data or options make no sense (before any weight is read), ``out`` holds something else, memory runs
        out, or the loss is no number; the last checkpoint stays, and the same call goes on from it.

    Notes
    -----
    Stopped and resumed on the same machine and versions, it gives the same weights bit for bit.
    """
    recipe = Recipe(
        method,
        dict(method_options or {}),
        targets or TargetOptions(),
        data_options or DataOptions(),
        forget_options,
        loop or LoopOptions(),
        run or RunOptions(),
    )
    sets = Sets(str(data), *(None if name is None else str(name) for name in (eval_data, forget)))
    plan = make_plan(str(model), sets, recipe)
    if rates:
        return _train_rates(plan, Path(out), rates, overwrite=overwrite, progress=progress)
    return _train_one(plan, Path(out), overwrite=overwrite, progress=progress)


def _train_rates(
    plan: Plan, out: Path, rates: Sequence[float], *, overwrite: bool, progress: Callable[[Tick], None] | None
) -> dict[str, Any]:
    """Train with each rate, and name the one with the best held-out metric; one that diverges does not end the rest."""
    if plan.held is None:
        message = "--lr names several rates, and the best is told by held-out data: pass --holdout or --eval-data."
        raise OptionError(message)
    loops = [replace(plan.recipe.loop, lr=rate) for rate in dict.fromkeys(rates)]
    with accelerated(plan.recipe.run, seed=plan.recipe.loop.seed) as accelerator:
        folder = _open(plan, out, accelerator, rates=list(rates), overwrite=overwrite)
    rows: list[dict[str, Any]] = []
    for loop in loops:
        rate, name = loop.lr, f"lr-{loop.lr:g}"
        one = replace(plan, recipe=replace(plan.recipe, loop=loop))
        try:
            results = _train_one(one, out / name, overwrite=False, progress=progress)["results"]
            rows.append({"lr": rate, "folder": name, "results": results})
        except NumericalError as failure:
            rows.append({"lr": rate, "folder": name, "failed": str(failure)})
    ended = [row for row in rows if "results" in row]
    if not ended:
        message = f"Training failed with every rate; with {rows[0]['lr']:g}: {rows[0]['failed']}"
        raise NumericalError(message)
    best = min(ended, key=lambda row: _badness(row["results"]["learned"]))
    folder.write({**folder.report, "finished": True, "runs": rows, "best": best["folder"]})
    return folder.report


def _badness(learned: dict[str, Any]) -> tuple[float, float]:
    """Order by the metric, then by loss."""
    return (learned["perplexity"] if "perplexity" in learned else -learned["accuracy"], learned["loss"])


def _train_one(plan: Plan, out: Path, *, overwrite: bool, progress: Callable[[Tick], None] | None) -> dict[str, Any]:
    """Train with one rate, from the newest checkpoint if there is one."""
    with accelerated(plan.recipe.run, seed=plan.recipe.loop.seed) as accelerator:
        folder = _open(plan, out, accelerator, overwrite=overwrite)
        if folder.report["finished"]:
            return folder.report
        return Training(plan, folder, accelerator).run(progress)


def _open(plan: Plan, out: Path, accelerator: Any, *, overwrite: bool, rates: Sequence[float] = ()) -> Folder:
    """Begin a folder, the writing process first."""
    folder = Folder(out, writes=accelerator.is_main_process)
    loop = asdict(plan.recipe.loop) | ({"lr": list(rates)} if rates else {})
    identity = {**plan.identity, "loop": loop, "processes": accelerator.num_processes}
    with accelerator.main_process_first():
        folder.begin(identity, overwrite=overwrite)
    return folder
