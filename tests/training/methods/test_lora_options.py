"""What LoRA's options mean where no model runs: learning rates, counts, starts, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deltaspec.errors import OptionError
from deltaspec.training.sites.model_sites import base_matrix, module_at
from tests.tiny_models import build
from tests.training.methods.lora_models import VARIANTS, start


def test_learning_rates() -> None:
    """LoRA+: B and its bias learn λ times as fast; lengths and biases do not decay. All of it is trained once."""
    attachment = start(build("classifier"), lora_bias=True, bias="all", lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in attachment.trained().items()}
    listed = [(names[id(p)], group.factor, group.decay) for group in attachment.groups() for p in group.parameters]
    assert sorted(name for name, _, _ in listed) == sorted(names.values())
    for name, factor, decay in listed:
        assert factor == (16.0 if ".lora_B." in name else 1.0), name
        assert decay == name.endswith((".lora_A.weight", ".lora_B.weight")), name
    assert {group.decay for group in start(build("llama"), dora=True).groups()} == {True, False}


def test_counts_without_weights() -> None:
    """On the meta device nothing is computed, and shapes are those of a model with weights."""
    for options in VARIANTS.values():
        real = start(build("gpt2"), **options)
        with torch.device("meta"):
            model = type(real.model)(real.model.config)
        found = start(model, **options)
        assert {n: tuple(t.shape) for n, t in found.state().items()} == {
            n: tuple(t.shape) for n, t in real.state().items()
        }
        assert found.stored() == real.stored() == sum(tensor.numel() for tensor in real.released().values())


def test_pissa_starts_from_the_largest_directions() -> None:
    """s·B·A is NumPy's best approximation of rank r, with equal halves of Σ in both factors."""
    attachment = start(build("llama"), init="pissa", rslora=True)
    for site in attachment.sites:
        update = attachment.updates[site.name]
        u, s, vt = np.linalg.svd(base_matrix(module_at(attachment.model, site.path), site).detach().double().numpy())
        product = (update.lora_B.detach().double() @ update.lora_A.detach().double()).numpy() * 7 / 3**0.5
        assert np.abs(product - (u[:, :3] * s[:3]) @ vt[:3]).max() <= 1e-6 * s[0]
        halves = torch.linalg.vector_norm(update.lora_A, dim=1), torch.linalg.vector_norm(update.lora_B, dim=0)
        assert torch.allclose(*halves, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "--rank is 0"),
        ({"rank": 2.5}, "--rank is 2.5"),
        ({"alpha": float("nan")}, "--alpha is nan"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"init": "olora"}, "--init is 'olora': expected one of kaiming, pissa"),
        ({"bias": "some"}, "--bias is 'some'"),
        ({"lr_ratio": 0.0}, "--lr-ratio is 0.0"),
        ({"lora_bias": True, "dora": True}, "--lora-bias goes with neither"),
        ({"patterns": {"x": (0, 1.0)}}, "--rank is 0"),
        ({"rank": 17}, "--rank is 17, but 'model.layers.0.self_attn.q_proj' is 16 × 16"),
        ({"lora_bias": True, "targets": "embed"}, "'model.embed_tokens' is an embedding"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        start(build("llama"), **options)
