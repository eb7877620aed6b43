"""The files of an adapter: keys, shapes, values and config by hand from PEFT's format; what it cannot hold is named."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from deltaspec.io.open import open_plain
from deltaspec.io.peft_writer import PeftForm, plan_adapter
from deltaspec.types import Checkpoint
from tests.families import FAMILIES, random_state, write
from tests.io.adapters import checkpoint, config_of, module, stored


def test_keys_shapes_and_values(tmp_path: Path) -> None:
    names = {"a.weight": (5, 4), "e.weight": (9, 3), "c.weight": (7, 2, 3, 3), "d.weight": (6, 2, 5)}
    parts = {
        "a": module("a"),
        "e": module("e", 9, 3, kind="embedding"),
        "c": module("c", 7, 18, kind="conv", kernel=(2, 3, 3)),
        "d": module("d", 6, 10, kind="conv", kernel=(2, 5)),
    }
    found = stored(checkpoint(tmp_path / "base", names), list(parts.values()), tmp_path / "adapter")
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {
        "a.lora_A.weight": (2, 4), "a.lora_B.weight": (5, 2),
        "e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (3, 2),
        "c.lora_A.weight": (2, 2, 3, 3), "c.lora_B.weight": (7, 2, 1, 1),
        "d.lora_A.weight": (2, 2, 5), "d.lora_B.weight": (6, 2, 1),
    }  # fmt: skip
    arrays = {key: tensor.double().numpy() for key, tensor in found.items()}
    products = {name: (m.read()[1].double() @ m.read()[0].double()).numpy() for name, m in parts.items()}
    assert np.allclose(arrays["a.lora_B.weight"] @ arrays["a.lora_A.weight"], products["a"])
    assert np.allclose((arrays["e.lora_embedding_B"] @ arrays["e.lora_embedding_A"]).T, products["e"])
    kernel = np.einsum("or,rikl->oikl", arrays["c.lora_B.weight"][:, :, 0, 0], arrays["c.lora_A.weight"])
    assert np.allclose(kernel.reshape(7, 18), products["c"])
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_stack_folds_experts_outside_ranks_in_A_and_inside_in_B(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"m.experts.gate_up_proj": (3, 5, 4), "m.experts.down_proj": (3, 4, 6)})
    first = module("m.experts.gate_up_proj", kind="stack", experts=3)
    second = module("m.experts.down_proj", 4, 6, kind="stack", experts=3, rank=3)
    found = stored(base, [first, second], tmp_path / "adapter")
    (a, b), (c, d) = first.read(), second.read()
    inner, outer = "m.experts.base_layer", "m.experts"
    assert set(found) == {f"{path}.lora_{side}.weight" for path in (inner, outer) for side in "AB"}
    for e in range(3):
        assert torch.equal(found[f"{inner}.lora_A.weight"][2 * e : 2 * e + 2], a[e])
        assert torch.equal(found[f"{inner}.lora_B.weight"][:, e::3], b[e])
        padded = torch.cat([c[e], torch.zeros(1, 6)])
        assert torch.equal(found[f"{outer}.lora_A.weight"][3 * e : 3 * e + 3], padded)
        assert torch.equal(found[f"{outer}.lora_B.weight"][:, e::3][:, :2], d[e])
    config = config_of(base, [first, second])
    assert config["target_parameters"] == ["m.experts.gate_up_proj", "m.experts.down_proj"]
    assert config["target_modules"] == []
    alone = stored(base, [first], tmp_path / "alone")
    assert set(alone) == {"m.experts.lora_A.weight", "m.experts.lora_B.weight"}


def test_a_stack_that_peft_takes_for_its_transpose(tmp_path: Path) -> None:
    """Llama 4 stores (experts, d_in, d_out) without saying so: lora_A meets what PEFT takes for inputs."""
    base = checkpoint(tmp_path / "base", {"m.experts.down_proj": (3, 4, 5)}, model_type="llama4_text")
    stack = module("m.experts.down_proj", kind="stack", experts=3, transposed=True)
    found = stored(base, [stack], tmp_path / "adapter")
    assert tuple(found["m.experts.lora_A.weight"].shape) == (6, 5)
    told = checkpoint(tmp_path / "told", {"m.experts.down_proj": (3, 4, 5)}, model_type="gpt_oss")
    assert tuple(stored(told, [stack], tmp_path / "other")["m.experts.lora_A.weight"].shape) == (6, 4)


def test_experts_stored_one_by_one_become_a_stack(tmp_path: Path) -> None:
    """Those without factors get zeros; w1 and w3 have ranks of their own."""
    family = FAMILIES["mixtral"]
    base = open_plain(write(tmp_path / "base", random_state(family), family.config))
    assert isinstance(base, Checkpoint)
    place = "model.layers.0.block_sparse_moe.experts"
    gate, up = module(f"{place}.1.w1", 40, 24), module(f"{place}.2.w3", 40, 24, k=1)
    found = stored(base, [gate, up], tmp_path / "adapter")
    lora_A, lora_B = (found[f"model.layers.0.mlp.experts.lora_{side}.weight"] for side in "AB")
    stack = np.einsum("ore,eri->eoi", lora_B.reshape(80, 3, 3), lora_A.reshape(3, 3, 24))
    wanted = np.zeros((3, 80, 24))
    wanted[1, :40] = (gate.read()[1] @ gate.read()[0]).numpy()
    wanted[2, 40:] = (up.read()[1] @ up.read()[0]).numpy()
    assert np.allclose(stack, wanted, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales(rslora: bool, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {f"{n}.weight": (5, 4) for n in ("a", "x.a", "b", "c+d")})
    modules = [module("a", rank=3), module("x.a"), module("b"), module("c+d", rank=16)]
    config = config_of(base, modules, rslora=rslora)
    assert (config["r"], config["use_rslora"]) == (2, rslora)
    assert config["lora_alpha"] == (math.sqrt(2) if rslora else 2)
    for path, rank in (("a", 3), ("x.a", 2), ("b", 2), ("c+d", 16)):
        (found, alpha) = (
            next((v for k, v in config[key].items() if re.match(rf"(.*\.)?({k})$", path)), config[default])
            for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        assert found == rank
        assert alpha / (math.sqrt(rank) if rslora else rank) == 1.0
    adapter = stored(base, modules, tmp_path / "adapter", rslora=rslora)
    assert torch.equal(adapter["a.lora_A.weight"][2:], torch.zeros(1, 4))
    assert all(term.scaling == 1.0 for term in open_plain(tmp_path / "adapter").modules.values())  # type: ignore[union-attr]


def test_biases_go_with_all_targets_or_none(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"a.weight": (5, 4), "b.weight": (5, 4), "e.weight": (9, 4)})
    carrying = module("a", read_bias=lambda: torch.arange(5.0))
    found = stored(base, [carrying, module("b")], tmp_path / "adapter", dtype="bf16")
    assert torch.equal(found["a.lora_B.bias"], torch.arange(5.0).bfloat16())
    assert torch.equal(found["b.lora_B.bias"], torch.zeros(5).bfloat16())
    assert config_of(base, [carrying])["lora_bias"] is True
    plan = plan_adapter([carrying, module("e", 9, 4, kind="embedding")], [], base=base, form=PeftForm("fp32"))
    assert plan.config["lora_bias"] is False
    assert "'e'" in plan.refused["a.bias"]
    assert not any("bias" in entry.name for entry in plan.entries)


def test_a_unet_by_its_keys(tmp_path: Path) -> None:
    """diffusers adds no prefix to its own names; convolutions keep their kernels."""
    family = FAMILIES["unet"]
    base = open_plain(write(tmp_path / "base", random_state(family), family.config))
    assert isinstance(base, Checkpoint)
    modules = []
    for name, shape in family.tensors.items():
        if name.endswith(".weight") and len(shape) > 1:
            kind, kernel = ("conv", shape[1:]) if len(shape) == 4 else ("linear", ())
            modules.append(
                module(name.removesuffix(".weight"), shape[0], math.prod(shape[1:]), kind=kind, kernel=kernel)
            )
    found = stored(base, modules, tmp_path / "adapter")
    for one in modules:
        ends = (1,) * (len(one.kernel) - 1) if one.kernel else ()
        assert tuple(found[f"{one.path}.lora_A.weight"].shape) == (2, *(one.kernel or (one.shape[1],)))
        assert tuple(found[f"{one.path}.lora_B.weight"].shape) == (one.shape[0], 2, *ends)
    assert config_of(base, modules)["target_modules"] == [one.path for one in modules]


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("BertForSequenceClassification", None),  # PEFT would ask for a classifier that need not be there
        ("T5ForConditionalGeneration", None),
    ],
)
def test_who_loads_it(architecture: str, task: str | None, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {"a.weight": (5, 4)}, architectures=[architecture])
    config = config_of(base, [module("a")])
    assert config["task_type"] == task
    assert config["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    if task is None:
        assert config["auto_mapping"] == {"base_model_class": architecture, "parent_library": "transformers"}
    hub = Checkpoint("owner/name@main", base.root, base.files, base.tensors, base.config, revision="0123abc")
    named = config_of(hub, [module("a")])
    assert (named["base_model_name_or_path"], named["revision"]) == ("owner/name", "0123abc")
