"""Configs that lie, names and shapes that make no sense: nothing crashes, nothing is sliced wrongly."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaspec.architecture.match import Identification, identify
from deltaspec.architecture.views import view_matrix
from tests.families import FAMILIES, Family

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "bloom", "falcon", "deberta"])
@pytest.mark.parametrize("heads", ["x", 0, None, [4], 4.0, True, -4, 5, 10**30, {"a": 1}])
def test_fused_attention_stays_whole_without_sensible_heads(name: str, heads: object) -> None:
    names = ("num_attention_heads", "n_head")
    result = identify(FAMILIES[name].tensors, {**FAMILIES[name].config, **dict.fromkeys(names, heads)})
    fused = [
        tensor for tensor in FAMILIES[name].tensors if re.search(r"qkv_proj\.w|query_key_value\.w|in_proj\.w", tensor)
    ]
    assert fused
    for tensor in fused:
        (found,) = result.matrices[tensor]
        assert (found.key.role, found.guessed) == ("qkv_proj", True)
        assert found.view.shape == FAMILIES[name].tensors[tensor]
    assert set(result.guessed) == set(fused)


def test_square_fused_attention_is_split_in_three_as_a_guess() -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    found = identify({name: (72, 24)}, {"model_type": "phi3"}).matrices[name]
    assert [(matrix.key.role, matrix.view.start, matrix.guessed) for matrix in found] == [
        ("q_proj", 0, True),
        ("k_proj", 24, True),
        ("v_proj", 48, True),
    ]


@given(
    heads=st.integers(-1, 9), shared=st.integers(-1, 9), size=st.integers(-1, 9) | st.none(), rows=st.integers(0, 100)
)
def test_no_config_makes_slices_that_miss_or_repeat_rows(heads: int, shared: int, size: int | None, rows: int) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": shared, "num_kv_heads": shared, "head_dim": size}
    for kind, name in [("phi3", "layers.0.qkv_proj.weight"), ("falcon", "h.0.query_key_value.weight")]:
        config = {"model_type": kind, "new_decoder_architecture": True, **sizes}
        numbers = torch.arange(rows * 24).reshape(rows, 24)
        parts = [view_matrix(numbers, matrix.view) for matrix in identify({name: (rows, 24)}, config).matrices[name]]
        assert torch.equal(torch.cat(parts).flatten().sort().values, numbers.flatten())


HOSTILE: list[dict[str, Any]] = [
    {"model_type": 3},
    {"model_type": ["llama"], "text_config": "no", "vision_config": 7},
    {"model_type": None, "_class_name": {}, "text_config": {"model_type": {}}},
    {"model_type": "gpt2", "hidden_size": "wide", "n_head": {}, "head_dim": []},
    {"model_type": "qwen3_moe", "hidden_size": -1, "new_decoder_architecture": "yes", "multi_query": 0.5},
]


@pytest.mark.parametrize("config", HOSTILE)
@ALL
def test_a_lying_config_never_loses_an_element(family: Family, config: dict[str, Any]) -> None:
    result = identify(family.tensors, config)
    assert set(result.matrices) | set(result.vectors) == set(family.tensors)
    for name, found in result.matrices.items():
        assert (
            sum(matrix.view.shape[0] * matrix.view.shape[1] for matrix in found)
            == torch.Size(family.tensors[name]).numel()
        )


def test_a_stack_that_contradicts_the_config_is_not_split() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = identify({name: (3, 24, 80)}, {"model_type": "qwen3_moe", "hidden_size": 24}).matrices[name]
    assert [(matrix.key.role, matrix.key.expert, matrix.guessed) for matrix in found] == [
        ("gate_up_proj", expert, True) for expert in range(3)
    ]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 3), (3, 0, 8), (0, 0)])
def test_empty_tensors_keep_their_shape(shape: tuple[int, ...]) -> None:
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"):
        found = identify({name: shape}, {"model_type": "qwen3_moe"}).matrices[name]
        assert found
        for matrix in found:
            assert tuple(view_matrix(torch.zeros(shape), matrix.view).shape) == matrix.view.shape
            assert 0 in matrix.view.shape


def test_numbers_too_long_for_an_index_are_none() -> None:
    name = f"model.layers.{'9' * 5000}.mlp.experts.{'9' * 5000}.up_proj.weight"
    (found,) = identify({name: (4, 4)}, {"model_type": "qwen3_moe"}).matrices[name]
    assert (found.key.role, found.key.depth, found.key.expert) == ("up_proj", None, None)
    name = "model.layers.999999999.mlp.up_proj.weight"
    assert identify({name: (4, 4)}, {}).matrices[name][0].key.depth == 999999999


def test_nothing_in_nothing_out() -> None:
    assert identify({}, {}) == Identification({}, {}, "generic", ())


def identify_experts(depths: int) -> float:
    """CPU seconds for each name of a model with 414 expert matrices in each of its blocks; the least of three."""
    roles = ("gate_proj", "up_proj", "down_proj")
    block = [f"mlp.experts.{expert}.{role}.weight" for expert in range(138) for role in roles]
    tensors = {f"model.layers.{depth}.{name}": (4, 4) for depth in range(depths) for name in block}
    spent = []
    for _ in range(3):
        start = time.process_time()
        identify(tensors, {"model_type": "qwen3_moe"})
        spent.append(time.process_time() - start)
    return min(spent) / len(tensors)


def test_the_cost_of_a_name_does_not_grow_with_their_number() -> None:
    """Twelve times the names: quadratic work would make each cost twelve times as much."""
    identify({}, {})
    assert identify_experts(48) < 4 * identify_experts(4)
