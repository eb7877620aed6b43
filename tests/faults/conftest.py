"""A pair that takes long enough to be killed in the middle of."""

from __future__ import annotations

import pytest
import torch

from tests.families import write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """48 matrices, each long enough that a kill meets some done, some in flight and some waiting."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(12) for p in "qkvo"]
    base = {name: torch.randn(320, 320, generator=generator) for name in names}
    tuned = {name: t + 0.01 * torch.randn(320, 320, generator=generator) for name, t in base.items()}
    return [
        str(write(folder / side, state, {"model_type": "llama"})) for side, state in (("base", base), ("tuned", tuned))
    ]
