"""A checkpoint → a running transformers model, through deltaspec's own reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaspec.architecture.outline.build import quiet_transformers
from deltaspec.errors import CheckpointError, NumericalError
from deltaspec.files.dtypes import DTYPES, OPTIONS
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint
from deltaspec.workflows.shared.stored_weights import read_state
from deltaspec.workflows.shared.text_batches import Batch


@dataclass(frozen=True, slots=True)
class ModelKind:
    """How transformers runs a checkpoint: its config and class.

    ``body`` is its class without a head; ``causal`` models read texts from left to right, and ``packed`` ones of them
    one after another.
    ``limits`` are the longest sequence, and how many token ids there are; 0 where the config does not say.
    """

    config: Any
    cls: Any
    body: Any
    packed: bool
    limits: tuple[int, int]
    causal: bool

    @property
    def headless(self) -> bool:
        """Whether it returns hidden states alone."""
        return self.cls is self.body


def refuse_model(checkpoint: Checkpoint, what: str, cause: Exception) -> CheckpointError:
    """Return the error for what transformers cannot do with a checkpoint, and why it says so."""
    said = " ".join(str(cause).split())[:300] or type(cause).__name__
    message = f"Cannot {what} of '{checkpoint.ref}' with transformers ({said}): check that its folder is complete."
    return CheckpointError(message)


def open_model(ref: str) -> Checkpoint:
    """Open a checkpoint that can be run: a folder or hub id with a config.json.

    Raises
    ------
    CheckpointError
        If it cannot be opened, is an adapter, or has no config.json.
    """
    checkpoint = open_plain(ref)
    if not isinstance(checkpoint, Checkpoint):
        message = f"Cannot run '{ref}': it is an adapter; merge it into its base first."
        raise CheckpointError(message)
    if not checkpoint.config:
        message = f"Cannot run '{ref}': there is no config.json beside its weights; pass the model's whole folder."
        raise CheckpointError(message)
    return checkpoint


def describe_model(checkpoint: Checkpoint) -> ModelKind:
    """Say which class of transformers runs a checkpoint; code that comes with a checkpoint never runs.

    Raises
    ------
    CheckpointError
        If transformers does not know it.
    MissingPackageError
        If transformers is not installed.
    """
    with quiet_transformers() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False)
        except Exception as cause:  # every model's config raises its own
            raise refuse_model(checkpoint, "read the config", cause) from cause
        names = transformers.models.auto.modeling_auto
        architecture = (config.architectures or [""])[0]
        body = names.MODEL_MAPPING_NAMES.get(config.model_type, "")
        body = body if isinstance(body, str) else body[0]
        cls = getattr(transformers, architecture or body, None)
        if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
            message = f"Cannot run '{checkpoint.ref}': transformers has no class '{architecture or config.model_type}'."
            raise CheckpointError(message)
        texts = config.get_text_config()
        encoder = config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
            config, "is_decoder", False
        )
        causal = config.model_type in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder
        causal = causal and not config.is_encoder_decoder
        packed = causal and "Classification" not in architecture
        sizes = (getattr(texts, name, None) for name in ("max_position_embeddings", "vocab_size"))
        positions, rows = (size if isinstance(size, int) and size > 0 else 0 for size in sizes)
    return ModelKind(config, cls, getattr(transformers, body, None), packed, (positions, rows), causal)


def choose_dtype(checkpoint: Checkpoint, choice: str, *, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: ``choice`` (bf16, fp16, fp32), or for ``auto`` the most frequent stored one.

    That is fp32 at most; on the CPU fp16 becomes fp32, for it is thirty times slower there.
    """
    if choice != "auto":
        return OPTIONS[choice].torch
    sizes: Counter[str] = Counter()
    for spec in checkpoint.tensors.values():
        sizes[spec.dtype] += torch.Size(spec.shape).numel()
    found = DTYPES.get(sizes.most_common(1)[0][0])
    stored = found.torch if found and found.computes else torch.bfloat16
    slow = stored == torch.float16 and device.type == "cpu"  # thirty times slower there than fp32
    return torch.float32 if slow or stored == torch.float64 else stored


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model is loaded with, where that is not just what its checkpoint stores.

    Attributes
    ----------
    tensors : dict of Tensor, optional
        The weights, under the names of the checkpoint's files; None reads them from there.
    fresh : collection of str
        Parameters of the model that may be missing: they are drawn, by torch's generator.
    """

    tensors: dict[str, Tensor] | None = None
    fresh: Collection[str] = ()


STORED = Weights()


def load_model(
    checkpoint: Checkpoint, kind: ModelKind, weights: Weights = STORED, *, device: torch.device, dtype: torch.dtype
) -> Any:
    """Load a model in eval mode and without gradients; on the CPU it shares the mapped files' memory.

    Parameters
    ----------
    checkpoint : Checkpoint
    kind : ModelKind
    weights : Weights
        By default those of the checkpoint, all of them.
    device, dtype : where and in what it computes

    Raises
    ------
    CheckpointError
        If transformers refuses it, or weights are missing that its outputs depend on.
    """
    if hasattr(kind.config, "quantization_config"):
        del kind.config.quantization_config  # the weights come dequantised
    with quiet_transformers() as transformers:
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        try:
            model, info = kind.cls.from_pretrained(
                None,
                config=kind.config,
                state_dict=weights.tensors if weights.tensors is not None else read_state(checkpoint),
                output_loading_info=True,
                **{name: dtype},
            )
        except Exception as cause:  # every model raises its own
            raise refuse_model(checkpoint, "load the weights", cause) from cause
    _check_missing(set(info["missing_keys"]) - set(weights.fresh), checkpoint, kind)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.use_cache = False
    if model.config.pad_token_id is None:
        model.config.pad_token_id = -1  # nothing is padded, and classifiers look for the last token that is not this
    return model.requires_grad_(False).eval().to(device)  # noqa: FBT003


def _check_missing(names: Collection[str], checkpoint: Checkpoint, kind: ModelKind) -> None:
    """Refuse a model that lacks weights; a pooler that was never stored changes no hidden state."""
    missing = sorted(name for name in names if not (kind.headless and name.startswith("pooler.")))
    if missing:
        message = (
            f"Cannot run '{checkpoint.ref}': {kind.cls.__name__} needs '{missing[0]}' and it holds no such weight "
            f"({len(missing)} are missing); check that config.json belongs to these weights."
        )
        raise CheckpointError(message)


def run_model(model: Any, batch: Batch, *, device: torch.device) -> Any:
    """Run a model on one batch; an encoder-decoder model is made to repeat its input.

    Returns
    -------
    transformers.ModelOutput
        ``logits``, (n, length, outcomes) or (n, classes), or without a head ``last_hidden_state``, (n, length, d).

    Raises
    ------
    NumericalError
        If it runs out of memory on the device.
    """
    ids = batch.ids.to(device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    try:
        return model(**given)
    except torch.OutOfMemoryError as cause:
        message = f"Out of memory on {device} at {ids.numel()} tokens: pass a smaller --batch or --length."
        raise NumericalError(message) from cause
