"""What a training has learned, and what was lost of other data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltaspec.training.data.examples import padding
from deltaspec.training.measure.evaluate import evaluate
from deltaspec.training.measure.probe import probe
from deltaspec.workflows.training.plan import Plan


class Measure:
    """Evaluations of one training, all processes together.

    Parameters
    ----------
    plan : Plan
    model : nn.Module
        As ``accelerator.prepare`` returned it.
    accelerator : accelerate.Accelerator
    """

    def __init__(self, plan: Plan, model: Any, accelerator: Any) -> None:
        self.plan, self.model, self.accelerator = plan, model, accelerator
        self.pad = padding(plan.tokenizer)

    def learned(self) -> dict[str, float]:
        """Return loss, and accuracy or perplexity, on held-out data; nothing where there are none."""
        return self._evaluate(self.plan.held) if self.plan.held else {}

    def kept(self) -> dict[str, float]:
        """Return the accuracy of a probe on other data, or the perplexity of other text."""
        if not self.plan.forget:
            return {}
        if self.plan.recipe.data.task == "causal-lm":
            return self._evaluate(self.plan.forget[0])
        model = self.accelerator.unwrap_model(self.model)
        known, asked = self.plan.forget
        return {"accuracy": probe(model, known, asked, pad=self.pad, device=self.accelerator.device)}

    def _evaluate(self, examples: Any) -> dict[str, float]:
        found = self.accelerator
        return evaluate(
            self.model,
            examples,
            pad=self.pad,
            batch=self.plan.recipe.loop.batch,
            device=found.device,
            rank=found.process_index,
            world=found.num_processes,
            gather=self._add if found.num_processes > 1 else None,
        )

    def _add(self, sums: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").cpu()
        return total
