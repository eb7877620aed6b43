"""Which modules PEFT takes an adapter for: none but those meant, and what it cannot hold is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltaspec.architecture.running_names import place_tensors
from deltaspec.io.open import open_plain
from deltaspec.io.peft_writer import PeftForm, plan_adapter
from deltaspec.types import AdapterModule, Checkpoint, Entry, Place
from tests.families import FAMILIES, random_state, write
from tests.io.adapters import checkpoint, config_of, module, stored


class Net(nn.Module):
    """Modules whose names end alike, at the top and inside."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4, bias=False), "norm": nn.LayerNorm(4)})
        self.pre_norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.proj(x))
        return self.pre_norm(self.inner["norm"](x + self.inner["proj"](x)))


@pytest.mark.parametrize("paths", [["proj"], ["inner.proj"], ["proj", "inner.proj"]])
def test_a_name_that_others_end_in_hits_only_its_own_module(paths: list[str], tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 4)
    base = checkpoint(tmp_path / "base", {n: tuple(p.shape) for n, p in model.state_dict().items()})
    modules = [module(path, 4, 4) for path in paths]
    stored(base, modules, tmp_path / "adapter")
    wanted = Net()
    wanted.load_state_dict(model.state_dict())
    for one in modules:
        lora_A, lora_B = one.read()
        wanted.get_submodule(one.path).weight.data += lora_B @ lora_A  # type: ignore[union-attr, operator]
    found = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.allclose(found(x), wanted(x), atol=1e-6)


def test_a_tensor_that_peft_would_save_with_others_is_not_carried(tmp_path: Path) -> None:
    """modules_to_save matches by the bare end of a name: 'norm' means inner.norm and pre_norm too."""
    base = checkpoint(tmp_path / "base", {n: tuple(p.shape) for n, p in Net().state_dict().items()})
    names = ("norm.weight", "inner.norm.weight", "pre_norm.bias")
    full = [Entry(name, (4,), "F32", lambda: torch.ones(4)) for name in names]
    plan = plan_adapter([module("proj", 4, 4)], full, base=base, form=PeftForm("fp32"))
    assert plan.config["modules_to_save"] == ["inner.norm", "pre_norm"]
    assert plan.refused.keys() == {"norm.weight"}
    assert "'inner.norm'" in plan.refused["norm.weight"]
    kept = {entry.name.removeprefix("base_model.model.") for entry in plan.entries}
    assert {"inner.norm.bias", "pre_norm.weight"} < kept  # the rest of both modules, from the base


def test_a_module_stored_whole_and_adapted_inside_is_not_carried(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"v.embed.cls": (1, 4), "v.embed.proj.weight": (5, 4), "top": (2, 2)})
    full = [Entry(name, (2, 2), "F32", lambda: torch.ones(2, 2)) for name in ("v.embed.cls", "top")]
    plan = plan_adapter([module("v.embed.proj")], full, base=base, form=PeftForm("fp32"))
    assert plan.config["modules_to_save"] is None
    assert "has factors" in plan.refused["v.embed.cls"]
    assert "no module" in plan.refused["top"]


@pytest.mark.parametrize(
    ("names", "found", "words"),
    [
        ({"c.weight": (6, 1, 3)}, module("c", 6, 3, kind="conv", kernel=(1, 3)), "grouped"),
        ({"a.out_proj.weight": (4, 4), "a.in_proj_weight": (12, 4)}, module("a.out_proj", 4, 4), "MultiheadAttention"),
        ({"m.embed_positions.weight": (9, 4)}, module("m.embed_positions", 9, 4, kind="embedding"), "other means"),
        ({"encoder.conv1.weight": (5, 4, 3)}, module("encoder.conv1", 5, 12, kind="conv", kernel=(4, 3)), "wrapper"),
    ],
)
def test_factors_that_peft_cannot_hold_are_named(
    names: dict[str, tuple[int, ...]], found: AdapterModule, words: str, tmp_path: Path
) -> None:
    plan = plan_adapter([found], [], base=checkpoint(tmp_path, names), form=PeftForm("fp32"))
    assert not plan.entries
    assert words in plan.refused[found.path]


def test_several_parameters_of_one_module_in_an_unknown_order(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, {"m.experts.w1": (3, 5, 4), "m.experts.v1": (3, 5, 4)})
    stacks = [module(f"m.experts.{name}", kind="stack", experts=3) for name in ("w1", "v1")]
    plan = plan_adapter(stacks, [], base=base, form=PeftForm("fp32"))
    assert plan.refused.keys() == {"m.experts.w1", "m.experts.v1"}
    assert not plan.entries


def test_dense_layers_of_models_with_experts_are_reached_as_parameters(tmp_path: Path) -> None:
    """PEFT 0.21 takes modules named like older experts for experts, and drops them from target_modules."""
    family = FAMILIES["qwen3_moe"]
    base = open_plain(write(tmp_path / "base", random_state(family), family.config))
    assert isinstance(base, Checkpoint)
    modules = [module("model.layers.1.mlp.gate_proj", 40, 24), module("model.layers.0.self_attn.q_proj", 32, 24)]
    config = config_of(base, modules)
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert config["target_parameters"] == ["model.layers.1.mlp.gate_proj.weight"]
    plain = checkpoint(tmp_path / "plain", {"model.layers.1.mlp.gate_proj.weight": (40, 24)})
    assert config_of(plain, modules[:1])["target_modules"] == ["model.layers.1.mlp.gate_proj"]


def test_dinov2_splits_what_its_files_join() -> None:
    places = place_tensors(["encoder.layer.0.mlp.weights_in.weight"], {"model_type": "dinov2"})
    assert places["encoder.layer.0.mlp.weights_in.weight"] == (
        Place("encoder.layer.0.mlp.gate_proj.weight", None, 0, 2),
        Place("encoder.layer.0.mlp.up_proj.weight", None, 1, 2),
    )


@pytest.mark.parametrize(
    ("kind", "architecture", "name", "running"),
    [
        ("llava", "LlavaModel", "language_model.model.norm.weight", "language_model.norm.weight"),
        ("llava_next", "LlavaNextForConditionalGeneration", "image_newline", "model.image_newline"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "visual.x.weight", "model.visual.x.weight"),
        ("bert", "BertModel", "bert.encoder.x.weight", "encoder.x.weight"),
        ("bert", "BertForMaskedLM", "cls.predictions.bias", "cls.predictions.bias"),
        ("gpt2", "GPT2DoubleHeadsModel", "h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("gpt2", "GPT2Model", "h.0.ln_1.weight", "h.0.ln_1.weight"),
        ("", "", "model.layers.0.mlp.experts.7.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"),
        ("llama", "LlamaForCausalLM", "model.norm.weight", "model.norm.weight"),
    ],
)
def test_running_names(kind: str, architecture: str, name: str, running: str) -> None:
    config = {"model_type": kind, "architectures": [architecture]}
    assert place_tensors([name], config)[name][0].name == running
