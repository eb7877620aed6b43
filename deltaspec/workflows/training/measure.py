"""What a training has learned, and what was lost of other data."""

from __future__ import annotations

from torch import Tensor, nn

from deltaspec.training.data.examples import Examples, Share, padding
from deltaspec.training.measure.evaluate import Feed, evaluate
from deltaspec.training.measure.probe import probe
from deltaspec.types.running import Accelerator
from deltaspec.workflows.training.plan import TrainingPlan


class Measure:
    """Evaluations of one training, all processes together.

    Parameters
    ----------
    plan : TrainingPlan
    model : nn.Module
        As ``accelerator.prepare`` returned it.
    accelerator : accelerate.Accelerator
    """

    def __init__(self, plan: TrainingPlan, model: nn.Module, accelerator: Accelerator) -> None:
        self.plan, self.model, self.accelerator = plan, model, accelerator
        self.pad = padding(plan.tokenizer)

    def learned(self) -> dict[str, float]:
        """Return loss, and accuracy or perplexity, on held-out data; nothing where there are none."""
        return self._evaluate(self.plan.data.held) if self.plan.data.held else {}

    def kept(self) -> dict[str, float]:
        """Return the accuracy of a probe on other data, or the perplexity of other text."""
        if not self.plan.data.forget:
            return {}
        if self.plan.recipe.data.task == "causal-lm":
            return self._evaluate(self.plan.data.forget[0])
        model = self.accelerator.unwrap_model(self.model)
        known, asked = self.plan.data.forget
        feed = Feed(self.pad, device=self.accelerator.device)
        return {"accuracy": probe(model, known, asked, feed)}

    def _evaluate(self, examples: Examples) -> dict[str, float]:
        here = self.accelerator
        feed = Feed(self.pad, self.plan.recipe.loop.batch, here.device)
        share, gather = Share(here.process_index, here.num_processes), self._add if here.num_processes > 1 else None
        return evaluate(self.model, examples, feed, share=share, gather=gather)

    def _add(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()
