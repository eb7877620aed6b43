"""How far a base, and the base with an adapter, are from the fine-tune in what they say about a text."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.engine.local import resolve_devices
from deltaspec.errors import CheckpointError, NumericalError, PairingError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.types import AdapterIndex, Checkpoint
from deltaspec.workflows.merging.collect_changes import collect_changes
from deltaspec.workflows.merging.merge_tensor import merge_tensor
from deltaspec.workflows.shared.running_models import STORED, ModelKind, Weights, load_model, open_model, run_model
from deltaspec.workflows.shared.stored_weights import read_state
from deltaspec.workflows.shared.text_batches import Batch, Intake, Text, make_batches
from deltaspec.workflows.shared.tokenizer import load_tokenizer
from deltaspec.workflows.verification.common_class import choose_kinds, name_measure
from deltaspec.workflows.verification.output_distance import Reference, Score


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a text says; ``measure`` names the distribution that is compared, in words.

    It is that of next tokens for causal and encoder-decoder models, of each token for masked ones (nothing is masked),
    of classes for classifiers. Models without a head: for each text, the distribution over all the other texts that
    softmax of cosine similarity / 0.05 of mean-pooled hidden states gives, which is what sentence embeddings are
    trained by. Vocabularies of different sizes are compared over the tokens that both have.

    ``kl_base`` and ``kl_adapter`` are the mean of KL(tuned ‖ base) and of KL(tuned ‖ base + adapter), in nats, and
    ``top1_…`` the share of cases in which both models rank the same outcome first. ``hidden_…`` are ‖H - H_tuned‖ /
    ‖H_tuned‖ over the last hidden states, for models without a head. ``tokens`` were read, in ``cases`` distributions.
    """

    kl_base: float
    kl_adapter: float
    top1_base: float
    top1_adapter: float
    tokens: int
    cases: int
    measure: str
    hidden_base: float | None = None
    hidden_adapter: float | None = None


@dataclass(frozen=True, slots=True)
class _Cases:
    """What all three models are run on: the batches, and the device."""

    batches: list[Batch]
    device: torch.device

    def load(self, checkpoint: Checkpoint, kind: ModelKind, weights: Weights = STORED) -> Any:
        """Load one of them, in float32."""
        return load_model(checkpoint, kind, weights, device=self.device, dtype=torch.float32)


def divergence(
    base: str | Path,
    tuned: str | Path,
    adapter: str | Path,
    text: Text,
    *,
    progress: Callable[[str], None] | None = None,
) -> Divergence:
    """Compare base, and base + adapter, with the fine-tune on the same tokens.

    Parameters
    ----------
    base, tuned : str or Path
        Folders or hub ids, with config; the base's tokenizer is used, or tuned's where the base has none.
    adapter : str or Path
        A LoRA folder; its factors, biases and whole tensors are added to the base in memory, in float32.
    text : Text
    progress : callable, optional
        Called with a sentence at the start of each of the three models.

    Raises
    ------
    DeltaspecError
        If a model cannot be run, the text not be read, or an output is NaN.

    Notes
    -----
    One model at a time is in memory, in float32; the fine-tune's outputs wait in a temporary folder (TMPDIR), 4 bytes
    for each token and vocabulary entry. Divergences are summed in float64.
    """
    device = resolve_devices(text.options.device)[0]
    first, second, index = open_model(str(base)), open_model(str(tuned)), open_plain(adapter)
    if not isinstance(index, AdapterIndex):
        message = f"'{adapter}' is no adapter: pass a folder with adapter_config.json."
        raise PairingError(message)
    kinds = choose_kinds(first, second)
    cases = _Cases(_read_batches(text, (first, second), kinds), device)
    plain, adapted = _score((first, second, index), kinds, cases, progress or (lambda _: None))
    return _join(plain, adapted, cases, measure=name_measure(kinds[1]))


def _join(plain: Score, adapted: Score, cases: _Cases, *, measure: str) -> Divergence:
    return Divergence(
        plain.kl,
        adapted.kl,
        plain.top1,
        adapted.top1,
        tokens=sum(batch.ids.numel() for batch in cases.batches),
        cases=plain.cases,
        measure=measure,
        hidden_base=plain.hidden,
        hidden_adapter=adapted.hidden,
    )


def _score(
    models: tuple[Checkpoint, Checkpoint, AdapterIndex],
    kinds: tuple[ModelKind, ModelKind],
    cases: _Cases,
    tell: Callable[[str], None],
) -> tuple[Score, Score]:
    """Run the fine-tune, the base, and the base with the adapter, one after another; score the last two."""
    base, tuned, adapter = models
    with tempfile.TemporaryDirectory(prefix="deltaspec-", ignore_cleanup_errors=True) as folder:
        tell("running the fine-tune")
        reference = Reference(Path(folder), headless=kinds[1].headless)
        reference.store(_outputs(cases.load(tuned, kinds[1]), cases, tuned))
        tell("running the base")
        plain = reference.compare(_outputs(cases.load(base, kinds[0]), cases, base), device=cases.device)
        tell("running the base with the adapter")
        model = _load_adapted(base, kinds[0], adapter, cases)
        return plain, reference.compare(_outputs(model, cases, base), device=cases.device)


def _load_adapted(base: Checkpoint, kind: ModelKind, adapter: AdapterIndex, cases: _Cases) -> Any:
    kind, state = add_adapter(base, kind, adapter)
    return cases.load(base, kind, Weights(state))


def _read_batches(text: Text, models: tuple[Checkpoint, Checkpoint], kinds: tuple[ModelKind, ModelKind]) -> list[Batch]:
    """Tokenise for both: sequences and token ids that both take."""
    try:
        tokenizer = load_tokenizer(models[0])
    except CheckpointError:
        tokenizer = load_tokenizer(models[1])
    limits = zip(*(kind.limits for kind in kinds), strict=True)
    longest, vocabulary = (min((size for size in sizes if size), default=0) for sizes in limits)
    return make_batches(text, tokenizer, Intake(kinds[1].packed, longest, vocabulary, distinct=kinds[1].headless))


def add_adapter(base: Checkpoint, kind: ModelKind, adapter: AdapterIndex) -> tuple[ModelKind, dict[str, Tensor]]:
    """Return the base's tensors with an adapter added in float32, and the config that goes with them.

    Raises
    ------
    PairingError
        If the adapter belongs to another base.
    """
    changes, config = collect_changes(base, [(adapter, 1.0)]), copy.deepcopy(kind.config)
    state = read_state(base)
    for name, change in changes.tensors.items():
        state[name] = merge_tensor(change, dtype=torch.float32, found=lambda *_: None)
    state |= {name: read_tensor(spec) for name, spec in changes.added.items()}
    state |= {alias: state[name] for alias, name in base.aliases.items() if name in changes.tensors}
    for scope in (config, config.get_text_config()):
        if changes.vocabulary:
            scope.vocab_size = changes.vocabulary[1]
        if changes.untied:
            scope.tie_word_embeddings = False
    return replace(kind, config=config), state


def _outputs(model: Any, cases: _Cases, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Yield logits (cases, outcomes) of each batch, or hidden states (texts, tokens, d) where there is no head."""
    for batch in cases.batches:
        with torch.inference_mode():
            found = run_model(model, batch, device=cases.device)
        logits = getattr(found, "logits", None)
        values = found.last_hidden_state if logits is None else logits.flatten(0, -2)
        total = float(values.sum(dtype=torch.float64))
        if math.isnan(total) or total == math.inf:  # a head may rule out tokens by -inf
            message = f"The outputs of '{checkpoint.ref}' are NaN or infinite near text line {batch.lines[0]}."
            raise NumericalError(message)
        yield values
