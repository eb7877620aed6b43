"""Tiny random models of transformers, saved as folders with config, weights and a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "and",
    "ran",
    "far",
    "from",
    "it",
    "saw",
    "red",
    "blue",
    "hat",
    "with",
    "old",
    "new",
    "house",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64}),
    "tied": (
        "Qwen3ForCausalLM",
        {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True},
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "neox": ("GPTNeoXForCausalLM", {**SIZES, "max_position_embeddings": 64}),  # its fused rows go head by head
    "opt": (  # its head calls the decoder past the body
        "OPTForCausalLM",
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
            "dropout": 0.0,
        },
    ),
    "bert": ("BertModel", {**SIZES, "max_position_embeddings": 64}),
    "masked": ("BertForMaskedLM", {**SIZES, "max_position_embeddings": 64}),
    "classifier": ("BertForSequenceClassification", {**SIZES, "max_position_embeddings": 64, "num_labels": 3}),
    "mixtral": (
        "MixtralForCausalLM",
        {**SIZES, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
}


def write_tokenizer(folder: Path, *, causal: bool, extra: tuple[str, ...] = ()) -> None:
    """Words as tokens; encoders get [CLS] … [SEP], causal models have [SEP] as their end of text and no padding."""
    vocab = VOCAB | {word: len(VOCAB) + number for number, word in enumerate(extra)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "[SEP]"} if causal else {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if not causal:
        ends = [("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def build(name: str, *, seed: int = 0, **changed: Any) -> Any:
    """A model with random weights of a size that makes its outputs vary; in eval mode."""
    architecture, settings = CONFIGS[name]
    cls = getattr(transformers, architecture)
    config = cls.config_class(**{"vocab_size": len(VOCAB), **settings, **changed})
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.tie_weights()
    return model


def save(model: Any, folder: Path) -> Path:
    """Write a model and its tokenizer."""
    model.save_pretrained(folder)
    encoder = "Bert" in type(model).__name__ or model.config.is_encoder_decoder
    write_tokenizer(folder, causal=not encoder)
    return folder


def perturb(model: Any, *, size: float = 0.05, seed: int = 1) -> Any:
    """Move every floating-point parameter a little, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def write_text(path: Path, *, lines: int = 12, seed: int = 0) -> Path:
    """Sentences of 2 to 9 words, so that batches of sentences would need padding; a blank line among them."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = [" ".join(WORDS[number(0, len(WORDS))] for _ in range(number(2, 10))) for _ in range(lines)]
    path.write_text("\n".join([*rows[:3], "", *rows[3:]]) + "\n", encoding="utf-8")
    return path
