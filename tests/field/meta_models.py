"""Tiny Llama-like models, and the same ones as Meta's own code stores them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HEADS, KEYS, ROWS, WIDTH, HIDDEN, VOCAB = 4, 2, 8, 24, 40, 48  # q is (32, 24): heads need not make up the width
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": ROWS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
PARAMS = {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KEYS, "head_dim": ROWS, "vocab_size": VOCAB}


def hugging_face(seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state in transformers' names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    inner, keys = HEADS * ROWS, KEYS * ROWS
    state = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "lm_head.weight": draw(VOCAB, WIDTH)}
    state["model.norm.weight"] = draw(WIDTH)
    for depth in range(2):
        place = f"model.layers.{depth}."
        for name, shape in (("q", (inner, WIDTH)), ("k", (keys, WIDTH)), ("v", (keys, WIDTH)), ("o", (WIDTH, inner))):
            state[f"{place}self_attn.{name}_proj.weight"] = draw(*shape)
        for name, shape in (("gate", (HIDDEN, WIDTH)), ("up", (HIDDEN, WIDTH)), ("down", (WIDTH, HIDDEN))):
            state[f"{place}mlp.{name}_proj.weight"] = draw(*shape)
        state |= {f"{place}{name}.weight": draw(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
    return state


def turn_back(weight: Tensor, heads: int) -> Tensor:
    """Undo what transformers' conversion does: view(heads, d / 2, 2, in).transpose(1, 2).reshape(d · heads, in)."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width).contiguous()


def meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state in Meta's names and row order."""
    named = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for depth in range(2):
        ours, theirs = f"model.layers.{depth}.", f"layers.{depth}."
        named |= {
            f"{theirs}attention.wq.weight": turn_back(state[f"{ours}self_attn.q_proj.weight"], HEADS),
            f"{theirs}attention.wk.weight": turn_back(state[f"{ours}self_attn.k_proj.weight"], KEYS),
            f"{theirs}attention.wv.weight": state[f"{ours}self_attn.v_proj.weight"],
            f"{theirs}attention.wo.weight": state[f"{ours}self_attn.o_proj.weight"],
            f"{theirs}feed_forward.w1.weight": state[f"{ours}mlp.gate_proj.weight"],
            f"{theirs}feed_forward.w2.weight": state[f"{ours}mlp.down_proj.weight"],
            f"{theirs}feed_forward.w3.weight": state[f"{ours}mlp.up_proj.weight"],
            f"{theirs}attention_norm.weight": state[f"{ours}input_layernorm.weight"],
            f"{theirs}ffn_norm.weight": state[f"{ours}post_attention_layernorm.weight"],
        }
    return named


def rank_of(named: dict[str, Tensor], rank: int, ranks: int, *, by_vocabulary: bool) -> dict[str, Tensor]:
    """What fairscale's layers hold in one rank: Llama 3 splits the embedding by vocabulary, its elders by width."""
    split = {}
    for name, tensor in named.items():
        across = "wo" in name or "w2" in name or ("tok_embeddings" in name and not by_vocabulary)
        split[name] = tensor.clone() if tensor.ndim == 1 else tensor.chunk(ranks, int(across))[rank].clone()
    return split


def write_meta(
    folder: Path, named: dict[str, Tensor], ranks: int = 1, *, by_vocabulary: bool = True, params: bool = True
) -> Path:
    """A folder as Meta publishes it."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        torch.save(rank_of(named, rank, ranks, by_vocabulary=by_vocabulary), folder / f"consolidated.{rank:02d}.pth")
    if params:
        (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


def write_hugging_face(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
