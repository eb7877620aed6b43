"""How far a base, and the base with an adapter, are from the fine-tune in what they say about a text."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.engine.local import resolve_devices
from deltaspec.errors import CheckpointError, NumericalError, PairingError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.options import TextOptions
from deltaspec.pairing.names import align_names
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import AdapterIndex, Checkpoint
from deltaspec.workflows.merging.collect_changes import collect_changes
from deltaspec.workflows.merging.merge_tensor import merge_tensor
from deltaspec.workflows.shared.running_models import (
    ModelKind,
    describe_model,
    load_model,
    load_tokenizer,
    open_model,
    quiet_transformers,
    read_state,
    run_model,
)
from deltaspec.workflows.shared.text_batches import Batch, make_batches
from deltaspec.workflows.verification.output_distance import TEMPERATURE, Reference

TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a text says; ``measure`` names the distribution that is compared, in words.

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


def divergence(
    base: str | Path,
    tuned: str | Path,
    adapter: str | Path,
    text: str | Path,
    *,
    options: TextOptions | None = None,
    progress: Callable[[str], None] | None = None,
) -> Divergence:
    """Compare base, and base + adapter, with the fine-tune on the same tokens.

    Parameters
    ----------
    base, tuned : str or Path
        Folders or hub ids, with config; the base's tokenizer is used, or tuned's where the base has none.
    adapter : str or Path
        A LoRA folder; its factors, biases and whole tensors are added to the base in memory, in float32.
    text : str or Path
        See ``texts.read_texts``.
    options : TextOptions, optional
        By default 16,384 tokens.
    progress : callable, optional
        Called with a sentence at the start of each of the three models.

    Returns
    -------
    Divergence
        Of next-token distributions for causal and encoder-decoder models, of each token's for masked ones (nothing is
        masked), of classes for classifiers. Models without a head: for each text, the distribution over all the other
        texts that softmax of cosine similarity / 0.05 of mean-pooled hidden states gives, which is what sentence
        embeddings are trained by. Vocabularies of different sizes are compared over the tokens that both have.

    Raises
    ------
    DeltaspecError
        If a model cannot be run, the text not be read, or an output is NaN.

    Notes
    -----
    One model at a time is in memory, in float32; the fine-tune's outputs wait in a temporary folder (TMPDIR), 4 bytes
    for each token and vocabulary entry. Divergences are summed in float64.
    """
    options = options or TextOptions(tokens=TOKENS)
    tell = progress or (lambda _: None)
    device = resolve_devices(options.device)[0]
    first, second, index = open_model(str(base)), open_model(str(tuned)), open_plain(adapter)
    if not isinstance(index, AdapterIndex):
        message = f"'{adapter}' is no adapter: pass a folder with adapter_config.json."
        raise PairingError(message)
    kinds = choose_kinds(first, second)
    batches = _read_batches(Path(text), (first, second), kinds, options)
    with tempfile.TemporaryDirectory(prefix="deltaspec-", ignore_cleanup_errors=True) as folder:
        load = partial(load_model, device=device, dtype=torch.float32)
        tell("running the fine-tune")
        reference = Reference(Path(folder), headless=kinds[1].headless)
        reference.store(_outputs(load(second, kinds[1]), batches, second, device=device))
        tell("running the base")
        plain = reference.compare(_outputs(load(first, kinds[0]), batches, first, device=device), device=device)
        tell("running the base with the adapter")
        kind, state = add_adapter(first, kinds[0], index)
        model = load(first, kind, state=state)
        del state
        adapted = reference.compare(_outputs(model, batches, first, device=device), device=device)
    return Divergence(
        plain.kl,
        adapted.kl,
        plain.top1,
        adapted.top1,
        tokens=sum(batch.ids.numel() for batch in batches),
        cases=plain.cases,
        measure=_name_measure(kinds[1]),
        hidden_base=plain.hidden,
        hidden_adapter=adapted.hidden,
    )


def choose_kinds(base: Checkpoint, tuned: Checkpoint) -> tuple[ModelKind, ModelKind]:
    """Run both through one class: the fine-tune's, or a language-model head that both store, else without a head.

    Raises
    ------
    CheckpointError, PairingError
        If transformers does not know them, or they are not of one type.
    """
    first, second = describe_model(base), describe_model(tuned)
    if (a := first.config.model_type) != (b := second.config.model_type):
        message = f"Cannot compare '{base.ref}' and '{tuned.ref}': the base is of type '{a}', the fine-tune '{b}'."
        raise PairingError(message)
    with quiet_transformers() as transformers:
        names, kind = transformers.models.auto.modeling_auto, second.config.model_type
        heads = (names.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind), names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind))
        known = [getattr(transformers, name or "", None) for name in heads]
        for cls in filter(None, known if second.headless else [second.cls]):
            if _has_head(cls, first, base) and _has_head(cls, second, tuned):
                return replace(first, cls=cls), replace(second, cls=cls)
    bare = partial(replace, cls=second.body, body=second.body, packed=False)
    return bare(first), bare(second)


def _has_head(cls: Any, kind: ModelKind, checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint stores what a class has beyond its body; what is tied may be missing."""
    if kind.cls is cls:
        return True
    with torch.device("meta"):
        wanted = list(cls(kind.config).state_dict())
    head = {name for name in wanted if not name.startswith(f"{cls.base_model_prefix}.")}
    missing = head - set(align_names(checkpoint.tensors, wanted)[0].values())
    tied = (*HEAD_NAMES, "decoder.bias") if getattr(kind.config, "tie_word_embeddings", True) else ()
    return missing < head and all(name.endswith(tied) for name in missing)


def _read_batches(
    text: Path, models: tuple[Checkpoint, Checkpoint], kinds: tuple[ModelKind, ModelKind], options: TextOptions
) -> list[Batch]:
    """Tokenise for both: sequences and token ids that both take."""
    packed, headless, limits = kinds[1].packed, kinds[1].headless, (kinds[0].limits, kinds[1].limits)
    try:
        tokenizer = load_tokenizer(models[0])
    except CheckpointError:
        tokenizer = load_tokenizer(models[1])
    longest, rows = (min((size for size in sizes if size), default=0) for sizes in zip(*limits, strict=True))
    return make_batches(text, tokenizer, options, packed=packed, limits=(longest, rows), distinct=headless)


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


def _outputs(model: Any, batches: list[Batch], checkpoint: Checkpoint, *, device: torch.device) -> Iterator[Tensor]:
    """Yield logits (cases, outcomes) of each batch, or hidden states (texts, tokens, d) where there is no head."""
    for batch in batches:
        with torch.inference_mode():
            found = run_model(model, batch, device=device)
        logits = getattr(found, "logits", None)
        values = found.last_hidden_state if logits is None else logits.flatten(0, -2)
        total = float(values.sum(dtype=torch.float64))
        if math.isnan(total) or total == math.inf:  # a head may rule out tokens by -inf
            message = f"The outputs of '{checkpoint.ref}' are NaN or infinite near text line {batch.lines[0]}."
            raise NumericalError(message)
        yield values


def _name_measure(kind: ModelKind) -> str:
    name = kind.cls.__name__
    if kind.headless:
        return f"other texts, by cosine similarity / {TEMPERATURE} of mean-pooled hidden states ({name}, no head)"
    if "Classification" in name:
        return f"classes ({name})"
    if kind.packed or kind.config.is_encoder_decoder:
        return f"next token ({name})"
    return f"token at each place, nothing masked ({name})"
