"""What a model without weights says of itself: which modules its code calls, takes apart or asks for their class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaspec.architecture.outline.build import LARGEST, UnknownModelError, build_model
from deltaspec.architecture.outline.find import find_outline, outline_of
from deltaspec.architecture.outline.reads import ASIDE, ELSEWHERE, READ, find_uses
from deltaspec.architecture.running_names import misfit, outline_checkpoint, place_by_table, place_tensors
from deltaspec.types import Outline, Place

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "num_key_value_heads": 1}


class Scaled(nn.Linear):
    """A linear layer that does more."""

    def forward(self, x):
        """Return twice the usual."""
        return 2 * super().forward(x)


class Inner(nn.Module):
    """Uses each of its modules in another way."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.strided, self.asked = nn.Conv1d(4, 4, 3, stride=2), nn.ModuleList([nn.Conv1d(4, 4, 3), nn.ReLU()])
        self.seen, self.looped, self.aliased = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4)
        self.guarded, self.unknown, self.splits = nn.Linear(4, 4), nn.Linear(4, 4), 1
        self.handed, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)
        self.held = [self.aside]
        self.odd, self.grouped = Scaled(4, 4), nn.Conv1d(4, 4, 3, groups=2)

    def forward(self, x):
        """Run nothing: only the source is read."""
        x = self.called(x.to(self.called.weight.dtype))
        x = nn.functional.linear(x, self.read.weight)
        x = self.both(x) @ self.both.weight.T
        x = self.strided(x)[:: self.strided.stride[0]]
        for layer in self.asked:
            x = layer(x) if isinstance(layer, nn.Conv1d) else x
        if isinstance(self.seen.weight, torch.Tensor) and self.seen.bias is not None:
            x = self.seen(x)
        for number, layer in enumerate(self.looped):
            x = layer(x) + layer.weight[number]
        if self.splits > 1 and x.any():
            x = x @ self.guarded.weight
        x = self.guarded(x) if not self.splits else x @ self.unknown.weight if x.any() else self.unknown(x)
        x = torch.relu(x, weigh=self.handed)
        alias = self.aliased
        return self.grouped(self.odd(x)) + alias.weight

    def _init_weights(self):
        self.called.weight.data.zero_()


class Outer(nn.Module):
    """Reaches into its child, and has two embeddings that are one, of which it calls one."""

    def __init__(self):
        super().__init__()
        self.inner, self.shared, self.tokens = Inner(), nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.tokens.weight = self.shared.weight

    def get_input_embeddings(self):
        """Name the shared one without running it."""
        return self.shared

    def forward(self, ids):
        """Run nothing."""
        return self.inner(self.tokens(ids))


@pytest.fixture
def library():
    """Skip where the library is not installed."""
    import transformers

    return transformers


@pytest.fixture(scope="module")
def outline() -> Outline:
    """Outline the two classes above."""
    return outline_of(Outer(), "here")


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        ("called", ""),
        ("read", READ),
        ("both", READ),
        ("strided", "the model reads 'stride' of this module, which PEFT's wrapper lacks"),
        ("asked.0", "the model asks whether this module is a Conv1d, which PEFT's wrapper is not"),
        ("seen", ""),
        ("looped.0", READ),
        ("aliased", READ),
        ("guarded", ""),
        ("unknown", READ),
        ("handed", ELSEWHERE),
        ("aside", ASIDE),
        ("odd", ""),
        ("grouped", ""),
    ],
)
def test_modules_are_called_or_taken_apart(outline, path, refusal):
    holder = outline.holders[f"inner.{path}"]
    assert (holder.refusal, holder.read) == (refusal, refusal in (READ, ELSEWHERE, ASIDE))
    assert holder.wrapped == (path not in ("odd", "grouped"))
    assert holder.typed == (path in ("asked.0", "aside"))


def test_ties_are_parameters_that_are_one_and_an_embedding_that_nothing_calls_is_unread(outline):
    assert outline.ties == (frozenset({"shared.weight", "tokens.weight"}),)
    assert outline.unread == {"shared"}
    assert outline.tied_with("inner.called.weight") == {"inner.called.weight"}


def test_torchs_own_attention_reads_its_output_layer():
    uses = find_uses(nn.Sequential(nn.MultiheadAttention(4, 2)))
    assert uses.taken["0.out_proj"] == READ


@pytest.mark.usefixtures("library")
def test_every_stored_tensor_is_placed_by_the_librarys_own_table():
    """Experts one by one become blocks of a stack, gate before up; a tower's prefix changes."""
    config = {**LLAMA, "model_type": "phimoe", "architectures": ["PhimoeForCausalLM"], "num_local_experts": 2}
    found = place_tensors(
        [f"model.layers.1.block_sparse_moe.experts.1.{leaf}.weight" for leaf in ("w1", "w2", "w3")], config
    )
    stack = "model.layers.1.mlp.experts"
    assert list(found.values()) == [
        (Place(f"{stack}.gate_up_proj", 1, 0, 2),),
        (Place(f"{stack}.down_proj", 1, 0, 1),),
        (Place(f"{stack}.gate_up_proj", 1, 1, 2),),
    ]
    audio = {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]}
    audio |= {"text_config": {**SIZES, "model_type": "qwen2", "num_key_value_heads": 1}}
    names = ["language_model.lm_head.weight", "language_model.model.norm.weight"]
    assert [p[0].name for p in place_tensors(names, audio).values()] == [
        "lm_head.weight",
        "model.language_model.norm.weight",
    ]


@pytest.mark.usefixtures("library")
def test_what_loading_rearranges_is_said_to_be_moved_and_fits_nothing():
    config = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], **SIZES}
    outline = find_outline(config)
    assert isinstance(outline, Outline)
    held = Place("model.norm.weight", moved="PermuteForRope")
    said = misfit((held,), (16,), outline)
    assert said == f"{outline.source} rearranges it on loading (PermuteForRope)"
    assert misfit((Place("model.norm.weight"),), (17,), outline).endswith("has 'model.norm.weight' of shape (16,)")
    assert misfit((Place("nowhere.weight"),), (16,), outline).endswith("has no parameter of this name")
    assert misfit((Place("model.norm.weight"),), (16,), outline) == ""


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "there is no config.json beside the base"),
        ({"vocab_size": 4}, "config.json says no model_type"),
        ({"model_type": "none_such"}, "does not know model_type 'none_such'"),
        ({**LLAMA, "architectures": ["NoSuchModel"]}, "has no class 'NoSuchModel'"),
        ({**LLAMA, "num_hidden_layers": LARGEST + 1}, f"its config asks for {LARGEST + 1} as num_hidden_layers"),
        ({**LLAMA, "num_attention_heads": 0}, "its config makes no model"),
        ({"model_type": "swin", "depths": [3_000_000], "num_heads": [2]}, "its config asks for 3000000 by depths"),
        ({**LLAMA, "num_labels": 30_000_000}, "its config asks for 30000000 as num_labels"),
        ({**LLAMA, "conv_dim": [1] * 30_000}, "its config asks for 30000 by conv_dim"),
        ({"architecture": "local-dir:/tmp/x", "pretrained_cfg": {}}, "names a file or another model"),
        ({**LLAMA, "hidden_size": object()}, "its config holds what is no JSON"),
    ],
)
def test_a_config_that_makes_no_model_says_why(config, why):
    found = find_outline(config)
    assert isinstance(found, str)
    assert why in found


@pytest.mark.usefixtures("library")
def test_code_that_comes_with_a_model_is_not_run():
    with pytest.raises(UnknownModelError, match="does not know model_type 'mine'"):
        build_model({"model_type": "mine", "auto_map": {"AutoModel": "evil--evil.Model"}})


@pytest.mark.usefixtures("library")
def test_a_config_of_other_tensors_is_not_believed():
    there = {f"model.layers.{i}.self_attn.o_proj.weight": (16, 16) for i in range(2)}
    assert isinstance(outline_checkpoint(there, LLAMA), Outline)
    others = {**there, **{f"encoder.{i}.weight": (8, 8) for i in range(3)}}
    assert "3 of its 5 matrices are not what its config makes of" in str(outline_checkpoint(others, LLAMA))
    assert "2 of its 2 matrices" in str(outline_checkpoint(dict.fromkeys(there, (8, 8)), LLAMA))
    assert place_tensors(others, LLAMA) == place_by_table(others, LLAMA)
