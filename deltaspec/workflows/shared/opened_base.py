"""A base, opened once, however many models are compared with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deltaspec.io.open import open_plain
from deltaspec.types import Opened
from deltaspec.workflows.shared.running_models import choose_dtype, describe_model, load_model, open_model


class Base:
    """A base: its index, the norms of its matrices as they become known, and its running model once one is needed.

    Parameters
    ----------
    ref : str or Path
        A folder, a file, or a hub id with @revision.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """

    def __init__(self, ref: str | Path) -> None:
        self.ref = ref
        self.source: Opened = open_plain(ref)
        self.norms: dict[str, float] = {}  # of stored matrices, by key, as they become known
        self.running_norms: dict[str, float] = {}  # of the running model's; their last digit may be another
        self._model: Any = None

    def run(self) -> Any:
        """Return the running model of transformers, loaded at the first call, in the dtype that it is stored in.

        Raises
        ------
        CheckpointError
            If it has no config, or transformers cannot run it.
        """
        if self._model is None:
            checkpoint, device = open_model(str(self.ref)), torch.device("cpu")
            dtype = choose_dtype(checkpoint, "auto", device=device)
            self._model = load_model(checkpoint, describe_model(checkpoint), device=device, dtype=dtype)
        return self._model

    def outline(self) -> Any:
        """Return the model of transformers without its weights, on the meta device.

        Raises
        ------
        CheckpointError
            If it has no config, or transformers cannot run it.
        """
        from deltaspec.workflows.shared.meta_models import build_skeleton  # training's rooms load where they are needed

        return build_skeleton(describe_model(open_model(str(self.ref))))
