"""Sums of adapters keep the names that they came with, and what cannot be summed is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaspec.errors import OptionError, PairingError
from deltaspec.options import ExtractOptions, FormOptions, RankOptions
from deltaspec.workflows.extraction.combine import combine
from tests.families import FAMILIES, random_state, write
from tests.pairing.test_adapters import adapter, factors
from tests.workflows.extraction.test_extract import CPU
from tests.workflows.merging.test_merge import whole

Q = "model.layers.0.self_attn.q_proj"


def settings(rank=4, **ranks):
    return ExtractOptions(RankOptions(amounts=(rank,), **ranks), FormOptions(dtype="fp32"), CPU)


def stored(folder):
    return load_file(folder / "adapter_model.safetensors")


def product(folder, path, scaling=1.0):
    """scaling·B·A in NumPy, of the factors that a file holds under this very name."""
    a, b = (stored(folder)[f"base_model.model.{path}.lora_{side}.weight"].double().numpy() for side in "AB")
    return scaling * b @ a


@pytest.mark.parametrize("paths", [
    [f"model.layers.0.block_sparse_moe.experts.{e}.{leaf}" for e in (0, 1) for leaf in ("w1", "w3")],
    ["model.layers.0.mlp.experts.1.gate_proj", "model.layers.0.mlp.experts.1.down_proj", "model.layers.0.mlp.gate"],
    ["shared", "encoder.block.0.layer.0.SelfAttention.q"],
    ["encoder.conv1", Q],
])  # fmt: skip
def test_modules_keep_the_names_that_the_adapter_gave_them(paths, tmp_path):
    """Nothing is known of the base: experts one by one are no stack, and no name is another's alias."""
    change = adapter(tmp_path / "lora", {path: factors(7, 5, seed=i) for i, path in enumerate(paths)})
    combine([(change, 0.5)], tmp_path / "out", options=settings())
    assert stored(tmp_path / "out").keys() == stored(change).keys()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(paths)
    assert config["target_parameters"] is None
    for path in paths:
        assert np.allclose(product(tmp_path / "out", path), product(change, path, 0.5 * 2), atol=1e-5)


def test_a_parameter_that_the_adapter_targets_stays_one(tmp_path):
    """A router's weight alone, as PEFT saves it for models where it is no linear layer."""
    router = "model.layers.0.mlp.gate"
    names = {"target_modules": [Q], "target_parameters": [f"{router}.weight"], "peft_version": "0.21.2"}
    change = adapter(tmp_path / "lora", {Q: factors(7, 5), router: factors(3, 5, seed=1)}, **names)
    combine([(change, 1.0)], tmp_path / "out", options=settings(2))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: config[name] for name in names} == names
    assert stored(tmp_path / "out").keys() == stored(change).keys()


class Mixture(torch.nn.Module):
    """Two experts, each a module of its own."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({"w1": torch.nn.Linear(5, 7), "w2": torch.nn.Linear(7, 5)}) for _ in range(2)
        )

    def forward(self, x):
        return sum(expert["w2"](expert["w1"](x).tanh()) for expert in self.experts)


def test_peft_loads_the_resized_adapter_of_single_experts(tmp_path):
    torch.manual_seed(0)
    base, x = Mixture(), torch.randn(3, 5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["w1", "w2"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "lora")
    combine([(tmp_path / "lora", 1.0)], tmp_path / "out", options=settings(3))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert torch.allclose(again(x), model(x), atol=1e-5)
    assert not torch.allclose(base(x), model(x), atol=1e-2)


def test_flattened_names_are_refused(tmp_path):
    file = tmp_path / "style.safetensors"
    lora_A, lora_B = factors(6, 5)
    names = ("lora_down.weight", "lora_up.weight")
    save_file({f"lora_unet_mid_to_q.{n}": t for n, t in zip(names, (lora_A, lora_B), strict=True)}, file)
    with pytest.raises(PairingError, match=r"'lora_unet_mid_to_q'.*--base"):
        combine([(file, 1.0)], tmp_path / "out", options=settings())
    with pytest.raises(PairingError, match="without dots"):
        combine([(adapter(tmp_path / "lora", {Q: (lora_A, lora_B)}), 1.0), (file, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flattened_names_are_resolved_by_a_base(tmp_path):
    family = FAMILIES["llama"]
    base, file = write(tmp_path / "base", random_state(family), family.config), tmp_path / "style.safetensors"
    lora_A, lora_B = factors(24, 24)
    flat = f"lora_te_{Q.replace('.', '_')}"
    state = {f"{flat}.lora_down.weight": lora_A, f"{flat}.lora_up.weight": lora_B, f"{flat}.alpha": torch.tensor(2.0)}
    save_file(state, file)
    combine([(file, 0.5)], tmp_path / "out", base=base, options=settings())
    expected = 0.5 * 2 / 4 * (lora_B.double() @ lora_A.double()).numpy()
    assert np.allclose(product(tmp_path / "out", Q), expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [Q]
    other = write(tmp_path / "other", random_state(FAMILIES["bert"]), FAMILIES["bert"].config)
    with pytest.raises(PairingError):
        combine([(file, 1.0)], tmp_path / "two", base=other, options=settings())


@pytest.mark.parametrize(("weight", "scale"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_sum_of_zero_is_refused_whatever_its_biases_of_zeros(weight, scale, tmp_path):
    lora_A, lora_B = factors(6, 5)
    change = adapter(tmp_path / "lora", {Q: (lora_A, scale * lora_B)}, lora_bias=True)
    whole(change, {f"{Q}.lora_B.bias": torch.full((6,), 1 - weight)})
    with pytest.raises(PairingError, match=r"The sum of .* is zero"):
        combine([(change, weight)], tmp_path / "out", options=settings())
    assert not (tmp_path / "out").exists()


def test_a_bias_alone_is_a_sum(tmp_path):
    lora_A, lora_B = factors(6, 5)
    change = adapter(tmp_path / "lora", {Q: (lora_A, 0 * lora_B)}, lora_bias=True)
    whole(change, {f"{Q}.lora_B.bias": torch.arange(6.0)})
    combine([(change, 0.5)], tmp_path / "out", options=settings())
    assert torch.equal(
        stored(tmp_path / "out")[f"base_model.model.{Q}.lora_B.bias"], torch.arange(6.0)
    )  # alpha / r = 2


def test_weighted_budgets_need_a_base(tmp_path):
    change = adapter(tmp_path / "lora", {Q: factors(6, 5)})
    with pytest.raises(OptionError, match="--weighted"):
        combine([(change, 1.0)], tmp_path / "out", options=settings(30, policy="params", weighted=True))
    combine([(change, 1.0)], tmp_path / "out", options=settings(30, policy="params"))
