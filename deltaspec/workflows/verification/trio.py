"""The three that a verification looks at: a base, its fine-tune, and the adapter that stands for the fine-tune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaspec.errors import PairingError
from deltaspec.io.foreign_marks import describe_module
from deltaspec.io.intact import refuse_partial
from deltaspec.io.lay_out import lay_out
from deltaspec.io.open import open_plain
from deltaspec.io.peft_layout import Layout
from deltaspec.options import AnalyzeOptions
from deltaspec.pairing.adapters import pair_adapter
from deltaspec.pairing.plan import Plan, refuse_shapes
from deltaspec.pairing.renamed import choose_names
from deltaspec.types import AdapterIndex, Checkpoint, Opened
from deltaspec.workflows.analysis.analyze import pair_sources
from deltaspec.workflows.verification.claims import Claims, read_claims


@dataclass(frozen=True, slots=True)
class Trio:
    """All three, opened and paired; headers alone are read.

    Attributes
    ----------
    base : Checkpoint
    tuned : Checkpoint or AdapterIndex
    adapter : AdapterIndex
    changed, adapted : Plan
        Base against the fine-tune, and base against the adapter.
    layout : Layout
        The base as the running model has it, without ties to heads that the fine-tune holds apart.
    claims : Claims or None
        None where nothing is claimed of this fine-tune.
    """

    base: Checkpoint
    tuned: Checkpoint | AdapterIndex
    adapter: AdapterIndex
    changed: Plan
    adapted: Plan
    layout: Layout
    claims: Claims | None


def open_trio(base: str | Path, tuned: str | Path, adapter: str | Path, options: AnalyzeOptions) -> Trio:
    """Open and pair all three.

    Raises
    ------
    DeltaspecError
        If one cannot be read, they are in another order, or the adapter belongs to another base.
    """
    first, *others = (open_plain(ref) for ref in (base, tuned, adapter))
    second, index = choose_names(others, options.pairing)
    if isinstance(first, AdapterIndex) or not isinstance(index, AdapterIndex):
        what = describe_module(index.tensors) if isinstance(index, Checkpoint) else ""
        message = f"Cannot verify {index.ref}: it is {what}." if what else _misplaced(first, index)
        raise PairingError(message)
    refuse_partial(first, index)
    plan = pair_sources(first, second, options)
    refuse_shapes(plan.heads, vocabulary=False)
    claims = read_claims(index, second)
    adapted = pair_adapter(first, index, options)
    refuse_shapes(adapted.heads, vocabulary=False)
    heads = sorted({pair.key.tensor for pair in plan.pairs if pair.key.role == "lm_head"})
    return Trio(first, second, index, plan, adapted, lay_out(first, heads), claims)


def _misplaced(first: Opened, index: Opened) -> str:
    return f"Expected a base, a tuned model and a LoRA adapter, found {first.ref} and {index.ref}: check the order."
