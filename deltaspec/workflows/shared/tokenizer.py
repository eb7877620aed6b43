"""The tokenizer beside a checkpoint."""

from __future__ import annotations

from typing import Any

from deltaspec.architecture.outline.build import quiet_transformers
from deltaspec.errors import CheckpointError
from deltaspec.types import Checkpoint
from deltaspec.workflows.shared.running_models import refuse_model


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load a checkpoint's tokenizer.

    Raises
    ------
    CheckpointError
        If it has none, or transformers cannot read it.
    """
    place = checkpoint.ref.split("@")[0] if checkpoint.revision else str(checkpoint.root)
    with quiet_transformers() as transformers:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                place, revision=checkpoint.revision or "main", trust_remote_code=False
            )
        except Exception as cause:  # every tokenizer raises its own
            raise refuse_model(checkpoint, "read the tokenizer", cause) from cause
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made of nothing, where files are missing
        message = f"Cannot read the tokenizer of '{checkpoint.ref}': it knows no words; put its files beside the model."
        raise CheckpointError(message)
    return tokenizer
