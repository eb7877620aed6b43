"""Fused tensors against each model's own arithmetic, written as its forward does it, on activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltaspec.architecture.match import identify
from deltaspec.architecture.views import view_matrix
from tests.families import FAMILIES, random_state

Split = Callable[[Tensor, Tensor], dict[str, Tensor]]


def phi3_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = x @ weight.T
    heads, shared, size = 4, 2, 6
    edge = heads * size
    return {
        "q_proj": qkv[..., :edge],
        "k_proj": qkv[..., edge : edge + shared * size],
        "v_proj": qkv[..., edge + shared * size :],
    }


def gate_up(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    return {"gate_proj": gate, "up_proj": up}


def gpt2_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    query, key, value = torch.addmm(torch.zeros(72), x, weight).split(24, dim=1)
    return {"q_proj": query, "k_proj": key, "v_proj": value}


def gpt2_cross(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    key, value = torch.addmm(torch.zeros(48), x, weight).split(24, dim=1)
    return {"k_proj": key, "v_proj": value}


def neox_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = (x @ weight.T).view(1, len(x), -1, 3 * 6).transpose(1, 2)
    parts = zip(("q_proj", "k_proj", "v_proj"), qkv.chunk(3, dim=-1), strict=True)
    return {role: part.transpose(1, 2).reshape(len(x), -1) for role, part in parts}


def bloom_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = (x @ weight.T).view(len(x), 4, 3, 6)
    return {role: qkv[..., part, :].flatten(1) for part, role in enumerate(("q_proj", "k_proj", "v_proj"))}


def falcon_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = (x @ weight.T).view(len(x), -1, 4 // 2 + 2, 6)
    named = {"q_proj": qkv[:, :, :-2], "k_proj": qkv[:, :, [-2]], "v_proj": qkv[:, :, [-1]]}
    return {role: part.flatten(1) for role, part in named.items()}


def falcon_multi_query(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = (x @ weight.T).view(len(x), 4 + 2, 6)
    named = {"q_proj": qkv[:, :-2], "k_proj": qkv[:, [-2]], "v_proj": qkv[:, [-1]]}
    return {role: part.flatten(1) for role, part in named.items()}


def deberta_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    slices = weight.chunk(4 * 3, dim=0)
    rows = [torch.cat([slices[head * 3 + part] for head in range(4)], dim=0) for part in range(3)]
    return dict(zip(("q_proj", "k_proj", "v_proj"), (x @ part.T for part in rows), strict=True))


def modernbert_attention(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = (x @ weight.T).view(len(x), 3, -1, 6)
    return dict(zip(("q_proj", "k_proj", "v_proj"), (part.flatten(1) for part in qkv.unbind(1)), strict=True))


def qwen_vision(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    qkv = (x @ weight.T).reshape(len(x), 3, 4, -1).permute(1, 0, 2, 3).unbind(0)
    return dict(zip(("q_proj", "k_proj", "v_proj"), (part.flatten(1) for part in qkv), strict=True))


def geglu(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    hidden, gate = (x @ weight.T).chunk(2, dim=-1)
    return {"up_proj": hidden, "gate_proj": gate}


DEEP = "transformer.h.1"
CASES: list[tuple[str, str, Split]] = [
    ("phi3", "model.layers.1.self_attn.qkv_proj.weight", phi3_attention),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight", gate_up),
    ("gpt2", f"{DEEP}.attn.c_attn.weight", gpt2_attention),
    ("gpt2_cross_attention", f"{DEEP}.crossattention.c_attn.weight", gpt2_cross),
    ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight", neox_attention),
    ("bloom", f"{DEEP}.self_attention.query_key_value.weight", bloom_attention),
    ("falcon", f"{DEEP}.self_attention.query_key_value.weight", falcon_attention),
    ("falcon_multi_query", f"{DEEP}.self_attention.query_key_value.weight", falcon_multi_query),
    ("deberta", "deberta.encoder.layer.1.attention.self.in_proj.weight", deberta_attention),
    ("modernbert", "model.layers.1.attn.Wqkv.weight", modernbert_attention),
    ("modernbert", "model.layers.1.mlp.Wi.weight", gate_up),
    ("dinov2", "encoder.layer.1.mlp.weights_in.weight", gate_up),
    ("qwen2_vl", "visual.blocks.1.attn.qkv.weight", qwen_vision),
    ("unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", geglu),
]


@pytest.mark.parametrize(("family", "name", "forward"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_each_part_gives_what_the_model_computes(family: str, name: str, forward: Split) -> None:
    weight = random_state(FAMILIES[family])[name]
    found = identify(FAMILIES[family].tensors, FAMILIES[family].config).matrices[name]
    width = found[0].view.shape[1]
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    expected = forward(x, weight)
    assert {matrix.key.role for matrix in found} == set(expected)
    for matrix in found:
        part = view_matrix(weight, matrix.view)
        assert tuple(part.shape) == matrix.view.shape
        torch.testing.assert_close(x @ part.T, expected[matrix.key.role])
        assert matrix.key.part == matrix.key.role


def mixtral_expert(x: Tensor, stack: Tensor, expert: int) -> dict[str, Tensor]:
    gate, up = torch.nn.functional.linear(x, stack[expert]).chunk(2, dim=-1)
    return {"gate_proj": gate, "up_proj": up}


def gpt_oss_expert(x: Tensor, stack: Tensor, expert: int) -> dict[str, Tensor]:
    both = x @ stack[expert]
    return {"gate_proj": both[..., ::2], "up_proj": both[..., 1::2]}


def llama4_expert(x: Tensor, stack: Tensor, expert: int) -> dict[str, Tensor]:
    gate, up = torch.bmm(x.expand(len(stack), *x.shape), stack)[expert].chunk(2, dim=-1)
    return {"gate_proj": gate, "up_proj": up}


STACKS = [
    ("mixtral_stacked", "model.layers.1.mlp.experts", mixtral_expert, False),
    ("qwen3_moe_stacked", "model.layers.0.mlp.experts", mixtral_expert, False),
    ("gpt_oss", "model.layers.1.mlp.experts", gpt_oss_expert, True),
    ("llama4", "model.layers.1.feed_forward.experts", llama4_expert, True),
]


@pytest.mark.parametrize(("family", "prefix", "forward", "transposed"), STACKS, ids=[case[0] for case in STACKS])
def test_each_expert_of_a_stack_gives_what_the_model_computes(
    family: str, prefix: str, forward: Callable[[Tensor, Tensor, int], dict[str, Tensor]], transposed: bool
) -> None:
    state = random_state(FAMILIES[family])
    matrices = identify(FAMILIES[family].tensors, FAMILIES[family].config).matrices
    stack, down = state[f"{prefix}.gate_up_proj"], state[f"{prefix}.down_proj"]
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    parts = matrices[f"{prefix}.gate_up_proj"]
    assert [(matrix.key.expert, matrix.key.role) for matrix in parts] == [
        (expert, role) for expert in range(3) for role in ("gate_proj", "up_proj")
    ]
    for matrix in parts:
        assert matrix.key.expert is not None
        expected = forward(x, stack, matrix.key.expert)[matrix.key.role]
        torch.testing.assert_close(x @ view_matrix(stack, matrix.view).T, expected)
    hidden = torch.randn(5, parts[0].view.shape[0], generator=torch.Generator().manual_seed(2))
    for expert, matrix in enumerate(matrices[f"{prefix}.down_proj"]):
        expected = hidden @ down[expert] if transposed else torch.nn.functional.linear(hidden, down[expert])
        torch.testing.assert_close(hidden @ view_matrix(down, matrix.view).T, expected)
        assert (matrix.key.role, matrix.key.expert) == ("down_proj", expert)


def test_convolutions_are_flattened_as_they_act_on_patches() -> None:
    family = FAMILIES["unet"]
    name = "down_blocks.0.resnets.0.conv1.weight"
    kernel = random_state(family)[name]
    (matrix,) = identify(family.tensors, family.config).matrices[name]
    image = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    patches = torch.nn.functional.unfold(image, 3)
    expected = torch.nn.functional.conv2d(image, kernel).flatten(2)
    torch.testing.assert_close(view_matrix(kernel, matrix.view) @ patches[0], expected[0], rtol=1e-4, atol=1e-4)


def test_transposed_storage_is_turned() -> None:
    family = FAMILIES["gpt2"]
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = random_state(family)[name]
    (matrix,) = identify(family.tensors, family.config).matrices[name]
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x @ view_matrix(weight, matrix.view).T, torch.addmm(torch.zeros(96), x, weight))
