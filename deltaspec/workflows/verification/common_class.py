"""The one class of transformers that runs a base and its fine-tune, so that their outputs can be compared."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deltaspec.architecture.outline.build import quiet_transformers
from deltaspec.errors import PairingError
from deltaspec.pairing.names import align_names
from deltaspec.pairing.tied import HEAD_NAMES
from deltaspec.types import Checkpoint
from deltaspec.workflows.shared.running_models import ModelKind, describe_model
from deltaspec.workflows.verification.output_distance import TEMPERATURE


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


def name_measure(kind: ModelKind) -> str:
    """Name the distributions that a model's outputs are, in words."""
    name = kind.cls.__name__
    if kind.headless:
        return f"other texts, by cosine similarity / {TEMPERATURE} of mean-pooled hidden states ({name}, no head)"
    if "Classification" in name:
        return f"classes ({name})"
    if kind.packed or kind.config.is_encoder_decoder:
        return f"next token ({name})"
    return f"token at each place, nothing masked ({name})"
