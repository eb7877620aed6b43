"""One training at work: from its newest checkpoint to its report."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import torch
from torch import Tensor

from deltaspec.errors import NumericalError, OptionError
from deltaspec.store.formats.training import Forgotten, Learned, TrainingReport, TrainingResults
from deltaspec.store.training_folder import Folder, read_report
from deltaspec.training.data.examples import Batches, Share, padding
from deltaspec.training.loop.resume import pack_state, unpack_state, unpack_trained
from deltaspec.training.loop.sharded import gather_state, is_sharded, link_state
from deltaspec.training.loop.steps import Prepared, Tick, count_steps, make_optimizer, run_loop
from deltaspec.types.running import Accelerator
from deltaspec.workflows.training.measure import Measure
from deltaspec.workflows.training.plan import TrainingPlan, list_notes
from deltaspec.workflows.training.prepare_model import prepare_model
from deltaspec.workflows.training.process_memory import peak_memory, ran_out, reset_peak
from deltaspec.workflows.training.save import save_trained

PACKAGES = ("deltaspec", "torch", "transformers", "accelerate", "datasets")


class Training:
    """A planned training; the model is loaded when it is made.

    Parameters
    ----------
    plan : TrainingPlan
    folder : Folder
        Begun.
    accelerator : accelerate.Accelerator
    """

    def __init__(self, plan: TrainingPlan, folder: Folder, accelerator: Accelerator) -> None:
        self.plan, self.folder, self.accelerator = plan, folder, accelerator
        self.trained = prepare_model(plan, device=accelerator.device)
        self.newest = folder.newest()
        if self.newest:
            self.trained.load(unpack_trained(self.newest[1]))
        state = self.trained.state()
        self.links = link_state(self.trained.model, state)
        self.fixed = {name: tensor for name, tensor in state.items() if name not in self.links}
        optimizer = make_optimizer(self.trained.groups(), plan.recipe.loop)
        self.model, self.optimizer = accelerator.prepare(self.trained.model, optimizer)
        if is_sharded(self.model):
            self._refuse_probe()
            if folder.writes:  # a model in one piece, mapped from the base's files, to save from
                self.trained = prepare_model(plan, device=torch.device("cpu"))
        self.measure = Measure(plan, self.model, accelerator)
        self.progress: Callable[[Tick], None] | None = None

    def run(self, progress: Callable[[Tick], None] | None) -> TrainingReport:
        """Train to the end, and return the report; NumericalError where memory runs out or a loss is no number."""
        loop, found = self.plan.recipe.loop, self.accelerator
        reset_peak(found.device)
        batches = Batches(
            self.plan.data.train,
            size=loop.batch,
            seed=loop.seed,
            pad=padding(self.plan.tokenizer),
            share=Share(found.process_index, found.num_processes),
        )
        self.progress = progress
        try:
            start = self._begin()
            run_loop(Prepared(self.model, self.optimizer, found), batches, loop, start=start, after=self._after)
            return self._end(count_steps(batches, loop))
        except (RuntimeError, MemoryError) as cause:
            if not ran_out(cause):
                raise
            message = (
                f"Out of memory on {found.device}: pass a smaller --batch with more --accumulate, a smaller --length, "
                "--gradient-checkpointing, or --precision bf16; the last checkpoint is kept."
            )
            raise NumericalError(message) from cause

    def _begin(self) -> int:
        """Measure the untrained model, or put the newest checkpoint back; returns the steps that are done."""
        if self.newest is None:
            self.folder.rewind(None)
            if not self.plan.method.identity:  # before is the base, whatever the method starts with
                self.trained.attachment.enable(0.0)
            self._evaluate(0, kept=True)
            if not self.plan.method.identity:
                self.trained.attachment.enable(1.0)
            return 0
        position, packed = self.newest
        self.newest = None
        step: int = position["step"]
        self.folder.rewind(step)
        unpack_state(packed, self.optimizer, self.accelerator)
        if position["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(position["scaler"])
        return step

    def _gather(self) -> dict[str, Tensor]:
        """Return everything that was trained, whole, and bring it to the model that is saved from."""
        state = self.fixed | gather_state(self.accelerator.unwrap_model(self.model), self.links)
        if is_sharded(self.model) and self.folder.writes:
            self.trained.load(state)
        return state

    def _refuse_probe(self) -> None:
        if self.plan.data.forget and self.plan.recipe.data.task == "classification":
            message = "--forget runs a model's body alone, which FSDP cannot: leave it out, or train without FSDP."
            raise OptionError(message)

    def _after(self, tick: Tick) -> None:
        """Log a step, and evaluate and save where it is time; the end is seen to elsewhere."""
        run, last = self.plan.recipe.run, tick.step == tick.total
        self.folder.log(tick.to_dict())
        if self.progress:
            self.progress(tick)
        if not last and run.evaluate_every and tick.step % run.evaluate_every == 0:
            self._evaluate(tick.step, kept=False)
        if not last and run.checkpoint_every and tick.step % run.checkpoint_every == 0:
            self._checkpoint(tick.step)

    def _evaluate(self, step: int, *, kept: bool) -> None:
        if learned := self.measure.learned():
            self.folder.log({"step": step, "eval": learned})
        if kept and (found := self.measure.kept()):
            self.folder.log({"step": step, "forget": found})

    def _checkpoint(self, step: int) -> None:
        scaler = self.accelerator.scaler
        position = {"step": step, "scaler": scaler.state_dict() if scaler is not None else None}
        packed = pack_state(self._gather(), self.optimizer, self.accelerator)
        self.folder.checkpoint(step, lambda place: save_trained(place, self.trained, self.plan), packed, position)
        self.accelerator.wait_for_everyone()

    def _end(self, total: int) -> TrainingReport:
        """Measure and save what has come out, and report."""
        self._evaluate(total, kept=True)
        self._gather()
        self.folder.finish(lambda place: save_trained(place, self.trained, self.plan))
        if self.folder.writes:
            self.folder.write(self._report(total))
            self.folder.drop_states()
        self.accelerator.wait_for_everyone()
        return read_report(self.folder.path)

    def _report(self, total: int) -> TrainingReport:
        counts = self.plan.counts
        head = sum(parameter.numel() for parameter in self.trained.head.values())
        return {
            **self.folder.report,
            "finished": True,
            "versions": {name: version(name) for name in PACKAGES},
            "counts": {"trainable": counts.trainable, "head": head, "stored": counts.stored, "total": counts.total},
            "notes": list(list_notes(self.plan, device=self.accelerator.device)),
            "results": self._results(total),
        }

    def _results(self, total: int) -> TrainingResults:
        lines = self.folder.metrics()
        learned = [line["eval"] for line in lines if "eval" in line]
        kept = [line["forget"] for line in lines if "forget" in line]
        metric = next(iter(kept[0])) if kept and len(kept[0]) == 1 else "perplexity"
        found: Learned | None = {**learned[-1], "before": learned[0]} if learned else None
        lost: Forgotten | None = None
        if kept:
            lost = {"metric": metric, "before": kept[0][metric], "after": kept[-1][metric]}
        return {
            "learned": found,
            "forgotten": lost,
            "steps": total,
            "seconds_per_step": median(line["seconds"] for line in lines if "seconds" in line),
            "peak_memory": peak_memory(self.accelerator.device),
        }
