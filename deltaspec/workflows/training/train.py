"""A model and data → a fine-tuned model by any method, with what it learned and what it forgot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from deltaspec.errors import NumericalError, OptionError
from deltaspec.options.recipe import Recipe, check_recipe
from deltaspec.store.formats.training import Learned, RateRow, TrainingReport
from deltaspec.store.training_folder import Folder
from deltaspec.training.loop.steps import Tick
from deltaspec.types.running import Accelerator
from deltaspec.workflows.training.plan import TrainingPlan, plan_training
from deltaspec.workflows.training.prepare_model import accelerated
from deltaspec.workflows.training.session import Training


def train(
    base: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Callable[[Tick], None] | None = None,
) -> TrainingReport:
    """Fine-tune a model into a training folder, or go on with one that was stopped.

    Parameters
    ----------
    base : str or Path
        A folder or a hub id with @revision, with config and tokenizer.
    out : str or Path
        The training folder: train.json, metrics.jsonl, checkpoints/, final/; with several rates a folder for each.
    recipe : Recipe
        Method, data, loop and device.
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
    plan = plan_training(str(base), check_recipe(recipe))
    if recipe.rates:
        return _train_rates(plan, Path(out), overwrite=overwrite, progress=progress)
    return _train_one(plan, Path(out), overwrite=overwrite, progress=progress)


def _train_rates(
    plan: TrainingPlan, out: Path, *, overwrite: bool, progress: Callable[[Tick], None] | None
) -> TrainingReport:
    """Train with each rate, and name the one with the best held-out metric; one that diverges does not end the rest."""
    if plan.data.held is None:
        message = "--lr names several rates, and the best is told by held-out data: pass --holdout or --eval-data."
        raise OptionError(message)
    recipe = plan.recipe
    loops = [replace(recipe.loop, lr=rate) for rate in dict.fromkeys(recipe.rates)]
    with accelerated(recipe.run, seed=recipe.loop.seed) as accelerator:
        folder = _open(plan, out, accelerator, overwrite=overwrite)
    rows: list[RateRow] = []
    for loop in loops:
        rate, name = loop.lr, f"lr-{loop.lr:g}"
        one = replace(plan, recipe=replace(recipe, loop=loop, rates=()))
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


def _badness(learned: Learned | None) -> tuple[float, float]:
    """Order by the metric, then by loss."""
    assert learned is not None  # there are held-out data
    return (learned["perplexity"] if "perplexity" in learned else -learned["accuracy"], learned["loss"])


def _train_one(
    plan: TrainingPlan, out: Path, *, overwrite: bool, progress: Callable[[Tick], None] | None
) -> TrainingReport:
    """Train with one rate, from the newest checkpoint if there is one."""
    with accelerated(plan.recipe.run, seed=plan.recipe.loop.seed) as accelerator:
        folder = _open(plan, out, accelerator, overwrite=overwrite)
        if folder.report["finished"]:
            return folder.report
        return Training(plan, folder, accelerator).run(progress)


def _open(plan: TrainingPlan, out: Path, accelerator: Accelerator, *, overwrite: bool) -> Folder:
    """Begin a folder, the writing process first."""
    folder, recipe = Folder(out, writes=accelerator.is_main_process), plan.recipe
    loop = asdict(recipe.loop) | ({"lr": list(recipe.rates)} if recipe.rates else {})
    identity = {**plan.identity, "loop": loop, "processes": accelerator.num_processes}
    with accelerator.main_process_first():
        folder.begin(identity, overwrite=overwrite)
    return folder
