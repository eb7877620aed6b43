"""Roles, depths, stacks and experts of every family; guessing; hostile names and configs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from deltaspec.architecture.match import Identification, identify
from deltaspec.architecture.patterns import load_families
from deltaspec.architecture.roles import ORDER, ROLES
from deltaspec.architecture.views import view_matrix
from deltaspec.types import KnownMatrix
from tests.families import FAMILIES, Family

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
# Latent attention compresses queries, keys and values into spaces for which the vocabulary has no word.
WITHOUT_ROLE = re.compile(r"q_a_proj|kv_a_proj_with_mqa|kv_b_proj")


def read(family: Family) -> Identification:
    return identify(family.tensors, family.config)


def one(name: str, shape: tuple[int, ...], config: dict[str, Any] | None = None) -> KnownMatrix:
    (found,) = identify({name: shape}, config or {}).matrices[name]
    return found


@ALL
def test_every_tensor_is_known(family: Family) -> None:
    result = read(family)
    assert set(result.matrices) | set(result.vectors) == set(family.tensors)
    assert not set(result.matrices) & set(result.vectors)
    assert result.guessed == ()
    for name, found in result.matrices.items():
        for matrix in found:
            assert not matrix.guessed
            assert matrix.key.role in ROLES
            assert (matrix.key.role == "other") == bool(WITHOUT_ROLE.search(name))
    for name, key in result.vectors.items():
        assert len(family.tensors[name]) <= 1 or name.endswith("bias")
        assert key.role == ("bias" if name.endswith("bias") else "norm") or not re.search(
            r"norm|ln_|bias|LayerNorm", name
        )


@ALL
def test_matrices_cover_every_element_once(family: Family) -> None:
    for name, found in read(family).matrices.items():
        shape = family.tensors[name]
        numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
        seen = torch.cat([view_matrix(numbers, matrix.view).flatten() for matrix in found])
        assert torch.equal(seen.sort().values, numbers.flatten())


@ALL
def test_keys_are_unique(family: Family) -> None:
    result = read(family)
    keys = [str(matrix.key) for found in result.matrices.values() for matrix in found] + list(result.vectors)
    assert len(set(keys)) == len(keys)


@ALL
def test_prefixes_do_not_matter(family: Family) -> None:
    plain = read(family)
    wrapped = identify({f"module._orig_mod.{name}": shape for name, shape in family.tensors.items()}, family.config)
    for name, found in plain.matrices.items():
        other = wrapped.matrices[f"module._orig_mod.{name}"]
        for one_matrix, other_matrix in zip(found, other, strict=True):
            assert one_matrix.view == other_matrix.view
            for field in ("role", "part", "depth", "expert", "stack"):
                assert getattr(one_matrix.key, field) == getattr(other_matrix.key, field), (name, field)


@ALL
def test_names_alone_give_the_same_roles_where_nothing_is_fused(family: Family) -> None:
    known = read(family).matrices
    for name, found in identify(family.tensors, {}).matrices.items():
        if len(known[name]) == 1 and not found[0].guessed:
            assert found[0].key == known[name][0].key


DECODERS = [
    "llama",
    "qwen3",
    "starcoder2",
    "phi3",
    "gemma3_multimodal",
    "mixtral",
    "mixtral_stacked",
    "gpt_oss",
    "deepseek_v3",
]


@pytest.mark.parametrize("name", DECODERS)
def test_widths_follow_the_config(name: str) -> None:
    family = FAMILIES[name]
    config = {**family.config, **family.config.get("text_config", {})}
    hidden, heads, shared = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    inner, vocabulary = config["intermediate_size"], family.tensors.get("lm_head.weight", (48, 24))[0]
    widths = {
        "q_proj": (heads * size, hidden),
        "k_proj": (shared * size, hidden),
        "v_proj": (shared * size, hidden),
        "o_proj": (hidden, heads * size),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
    }
    if name == "deepseek_v3":
        for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            del widths[role]
    seen = set()
    for found in read(family).matrices.values():
        for matrix in found:
            if matrix.key.role in widths and matrix.key.stack in ("", "text"):
                assert matrix.view.shape == widths[matrix.key.role], matrix.key
                seen.add(matrix.key.role)
    assert {"embed"} <= seen


PLACES = [
    ("llama", "model.layers.1.self_attn.q_proj.weight", ("q_proj", 1, None, "")),
    ("llama", "model.embed_tokens.weight", ("embed", None, None, "")),
    ("phi3", "model.layers.1.mlp.down_proj.weight", ("down_proj", 1, None, "")),
    ("gpt2", "transformer.h.0.attn.c_proj.weight", ("o_proj", 0, None, "")),
    ("gpt2", "transformer.wpe.weight", ("position_embed", None, None, "")),
    ("gpt2_cross_attention", "transformer.h.1.crossattention.q_attn.weight", ("q_proj", 1, None, "cross")),
    ("gpt_neox", "embed_out.weight", ("lm_head", None, None, "")),
    ("bert", "bert.encoder.layer.1.attention.output.dense.weight", ("o_proj", 1, None, "")),
    ("bert", "bert.encoder.layer.1.output.dense.weight", ("down_proj", 1, None, "")),
    ("bert", "bert.embeddings.token_type_embeddings.weight", ("token_type_embed", None, None, "")),
    ("roberta", "classifier.out_proj.weight", ("classifier", None, None, "")),
    ("distilbert", "distilbert.transformer.layer.0.ffn.lin2.weight", ("down_proj", 0, None, "")),
    ("t5", "decoder.block.1.layer.1.EncDecAttention.o.weight", ("o_proj", 1, None, "cross")),
    ("t5", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", ("gate_proj", 1, None, "encoder")),
    (
        "t5",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ("position_embed", 0, None, "decoder"),
    ),
    ("whisper", "model.decoder.layers.1.encoder_attn.out_proj.weight", ("o_proj", 1, None, "cross")),
    ("whisper", "model.encoder.conv2.weight", ("conv", None, None, "encoder")),
    ("vit", "vit.encoder.layer.1.attention.attention.value.weight", ("v_proj", 1, None, "")),
    ("vit_in_memory", "layers.1.attention.o_proj.weight", ("o_proj", 1, None, "")),
    ("clip", "vision_model.encoder.layers.0.mlp.fc1.weight", ("up_proj", 0, None, "vision")),
    ("clip", "text_projection.weight", ("projection", None, None, "")),
    ("llava", "language_model.model.layers.1.mlp.gate_proj.weight", ("gate_proj", 1, None, "text")),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", ("down_proj", 1, 2, "")),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", ("router", 0, None, "")),
    ("qwen3_moe", "model.layers.0.mlp.experts.1.up_proj.weight", ("up_proj", 0, 1, "")),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert.up_proj.weight", ("up_proj", 0, None, "")),
    ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.weight", ("o_proj", 1, None, "up")),
    ("unet", "mid_block.resnets.1.conv1.weight", ("conv", 0, None, "mid")),
    ("unet", "time_embedding.linear_1.weight", ("time_embed", None, None, "")),
]


@pytest.mark.parametrize(("family", "name", "place"), PLACES)
def test_role_and_place(family: str, name: str, place: tuple[str, int | None, int | None, str]) -> None:
    (found,) = read(FAMILIES[family]).matrices[name]
    assert (found.key.role, found.key.depth, found.key.expert, found.key.stack) == place


def test_vectors_have_places_too() -> None:
    vectors = read(FAMILIES["whisper"]).vectors
    bias = vectors["model.decoder.layers.1.encoder_attn.q_proj.bias"]
    assert (bias.role, bias.depth, bias.stack) == ("bias", 1, "cross")
    stacked = read(FAMILIES["gpt_oss"]).vectors["model.layers.1.mlp.experts.gate_up_proj_bias"]
    assert (stacked.role, stacked.depth) == ("bias", 1)
    mask = identify({"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": ()}, {"model_type": "gpt2"})
    assert mask.matrices == {}
    assert mask.vectors["h.0.attn.bias"].role == "other"


def test_config_that_names_another_family_is_overruled_by_the_names() -> None:
    assert identify(FAMILIES["bert"].tensors, {"model_type": "t5"}).family == "bert"


def test_unknown_architecture_is_guessed_and_said() -> None:
    names = {"net.stages.3.mixer.wq.weight": (8, 4), "net.stages.3.frobnicate.weight": (4, 4), "net.head.table": (9, 4)}
    result = identify(names, {"model_type": "unheard_of"})
    assert result.family == "generic"
    assert result.guessed == tuple(names)
    places = [(found.key.role, found.key.depth) for (found,) in result.matrices.values()]
    assert places == [("q_proj", 3), ("frobnicate", 3), ("table", None)]


def test_unknown_shapes_are_flattened_unless_they_are_experts() -> None:
    assert one("net.0.kernel", (8, 3, 5, 5)).view.shape == (8, 75)
    found = identify({"net.4.experts.thing": (2, 8, 3)}, {}).matrices["net.4.experts.thing"]
    assert [(matrix.key.expert, matrix.key.depth, matrix.view.shape) for matrix in found] == [
        (0, 4, (8, 3)),
        (1, 4, (8, 3)),
    ]
    assert one("net.4.experts.7.thing", (8, 3)).key.expert == 7


def test_a_stack_is_never_one_flat_matrix_because_a_family_knows_its_last_name() -> None:
    block = {f"model.layers.0.self_attn.{role}.weight": (4, 4) for role in ("q_proj", "k_proj", "v_proj", "o_proj")}
    name = "model.layers.0.mlp.experts.up_proj"
    result = identify({**block, name: (3, 8, 4)}, {"model_type": "llama"})
    assert [(found.key.role, found.key.expert, found.view.shape) for found in result.matrices[name]] == [
        ("up_proj", expert, (8, 4)) for expert in range(3)
    ]
    assert result.guessed == (name,)


def test_tables_use_the_vocabulary() -> None:
    assert tuple(ROLES) == ORDER
    for family in load_families():
        for entry in family.roles.values():
            assert {entry.unsplit_role, *entry.parts} <= set(ROLES)
            assert entry.layout in ("equal", "alternating", "blocks", "grouped")
