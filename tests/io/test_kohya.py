"""kohya's naming: factors by flattened names, against products in NumPy; what is not LoRA is refused by its name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.errors import CheckpointError, PairingError
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.open import open_plain
from deltaspec.types import AdapterIndex
from deltaspec.workflows.merging.merge import merge
from tests.families import FAMILIES, random_state, write

UNET = random_state(FAMILIES["unet"])
TEXT = {
    name: tensor for name, tensor in random_state(FAMILIES["clip"]).items() if name.startswith("text_model.encoder")
}
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
PROJ = "down_blocks.0.attentions.0.proj_in"
FC1 = "text_model.encoder.layers.1.mlp.fc1"


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(prefix, path, weight, *, rank=2, alpha=None):
    """lora_down, lora_up and alpha of one module, shaped as kohya shapes them for linear and convolution layers."""
    name = prefix + path.replace(".", "_")
    ones = (1,) * (weight.ndim - 2)
    found = {
        f"{name}.lora_down.weight": 0.1 * draw(rank, *weight.shape[1:], seed=len(path)),
        f"{name}.lora_up.weight": draw(weight.shape[0], rank, *ones, seed=len(path) + 1),
    }
    return found | ({} if alpha is None else {f"{name}.alpha": alpha})


def file(path, *modules):
    state = {k: v.clone() for m in modules for k, v in m.items()}
    save_file(state, path, metadata={"ss_network_dim": "2"})
    return path


def change(found, scaling):
    down, up = (next(t for k, t in found.items() if side in k).double().numpy() for side in ("lora_down", "lora_up"))
    return scaling * up.reshape(len(up), -1) @ down.reshape(len(down), -1)


UNET_MODULES = {
    TO_Q: module("lora_unet_", TO_Q, UNET[f"{TO_Q}.weight"], alpha=torch.tensor(1.0)),
    OUT: module("lora_unet_", OUT, UNET[f"{OUT}.weight"]),
    CONV: module("lora_unet_", CONV, UNET[f"{CONV}.weight"], rank=3, alpha=torch.tensor([1.5]).half()),
    PROJ: module("lora_unet_", PROJ, UNET[f"{PROJ}.weight"], alpha=torch.tensor(4, dtype=torch.int64)),
}
SCALING = {TO_Q: 0.5, OUT: 1.0, CONV: 0.5, PROJ: 2.0}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_is_merged_whatever_prefix_its_file_has(prefix, tmp_path):
    base = write(tmp_path / "unet", {prefix + n: t for n, t in UNET.items()}, FAMILIES["unet"].config)
    merge(base, [file(tmp_path / "style.safetensors", *UNET_MODULES.values())], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in UNET.items():
        path = name.removesuffix(".weight")
        wanted = tensor.numpy()
        if path in UNET_MODULES:
            wanted = wanted + change(UNET_MODULES[path], SCALING[path]).reshape(wanted.shape).astype(np.float32)
        assert np.array_equal(merged[prefix + name].numpy(), wanted)


def test_it_is_analysed_as_an_adapter(tmp_path):
    base = write(tmp_path / "unet", UNET, FAMILIES["unet"].config)
    style = file(tmp_path / "style.safetensors", *UNET_MODULES.values())
    rows = {row["tensor"]: row for row in deltaspec.analyze(base, style, tmp_path / "run").to_dicts()}
    assert rows.keys() == {f"{path}.weight" for path in UNET_MODULES}
    for path, found in UNET_MODULES.items():
        wanted = np.linalg.norm(change(found, SCALING[path]))
        assert rows[f"{path}.weight"]["frobenius_norm"] == pytest.approx(wanted, rel=1e-9)


def test_both_components_of_one_file(tmp_path):
    state = {f"model.diffusion_model.{n}": t for n, t in UNET.items()}
    state |= {f"cond_stage_model.transformer.{n}": t for n, t in TEXT.items()}
    save_file(state, tmp_path / "whole.safetensors")
    text = module("lora_te_", FC1, TEXT[f"{FC1}.weight"])
    style = file(tmp_path / "style.safetensors", *UNET_MODULES.values(), text)
    report = merge(tmp_path / "whole.safetensors", [style], tmp_path / "out.safetensors")
    assert len(report.rows) == 5
    found = load_file(tmp_path / "out.safetensors")[f"cond_stage_model.transformer.{FC1}.weight"]
    assert np.array_equal(found.numpy(), TEXT[f"{FC1}.weight"].numpy() + change(text, 1).astype(np.float32))


def test_a_component_that_the_base_does_not_hold_is_listed(tmp_path):
    base = write(tmp_path / "unet", UNET, FAMILIES["unet"].config)
    text = module("lora_te1_", FC1, TEXT[f"{FC1}.weight"])
    style = file(tmp_path / "style.safetensors", *UNET_MODULES.values(), text)
    report = merge(base, [style], tmp_path / "out")
    assert len(report.rows) == 4
    assert any("lora_te1_*" in note and "none of its 1 modules" in note for note in report.notes)
    with pytest.raises(PairingError, match=f"targets 'lora_te1_{FC1.replace('.', '_')}'"):
        merge(base, [file(tmp_path / "text.safetensors", text)], tmp_path / "never")


def test_a_component_of_which_the_base_holds_some_is_of_another_base(tmp_path):
    base = write(tmp_path / "unet", UNET, FAMILIES["unet"].config)
    stray = module("lora_unet_", "up_blocks.7.conv", torch.ones(4, 4))
    with pytest.raises(PairingError, match="targets 'lora_unet_up_blocks_7_conv'"):
        merge(base, [file(tmp_path / "style.safetensors", *UNET_MODULES.values(), stray)], tmp_path / "out")
    wrong = module("lora_unet_", TO_Q, torch.ones(5, 5))
    with pytest.raises(PairingError, match="base has shape"):
        merge(base, [file(tmp_path / "wrong.safetensors", wrong)], tmp_path / "out")


@pytest.mark.parametrize("paths", [("one.layer.q", "two.layer.q"), ("layer_q", "layer.q")])
def test_a_name_that_may_mean_two_modules_is_refused(paths, tmp_path):
    base = write(tmp_path / "base", {f"{path}.weight": torch.ones(4, 4) for path in paths}, {})
    style = file(tmp_path / "style.safetensors", module("lora_unet_", "layer.q", torch.ones(4, 4)))
    with pytest.raises(PairingError, match="may be '.*' or '.*'"):
        merge(base, [style], tmp_path / "out")


def test_the_full_path_goes_before_the_end_of_another(tmp_path):
    state = {"layer.q.weight": torch.ones(4, 4), "other.layer.q.weight": torch.ones(4, 4)}
    base = write(tmp_path / "base", state, {})
    style = file(tmp_path / "style.safetensors", module("lora_unet_", "layer.q", torch.ones(4, 4)))
    assert [row.key.tensor for row in merge(base, [style], tmp_path / "out").rows] == ["layer.q.weight"]


def test_two_of_them_are_compared_by_their_flattened_names(tmp_path):
    style = file(tmp_path / "style.safetensors", *UNET_MODULES.values())
    run = deltaspec.analyze(style, style, tmp_path / "run")
    assert len(run.records) == 4
    assert all(record.method == "zero" for record in run.records)


def test_the_index_is_an_adapters(tmp_path):
    source = open_plain(file(tmp_path / "style.safetensors", *UNET_MODULES.values()))
    assert isinstance(source, AdapterIndex)
    assert {f"lora_unet_{path.replace('.', '_')}": s for path, s in SCALING.items()} == {
        name: term.scaling for name, term in source.modules.items()
    }
    assert fingerprint(source).keys() == {"style.safetensors"}


NAME = "lora_unet_mid_block_to_q"
A, B = torch.ones(2, 4), torch.ones(5, 2)
FINE = {f"{NAME}.lora_down.weight": A, f"{NAME}.lora_up.weight": B}


@pytest.mark.parametrize(("tensors", "said"), [
    ({f"{NAME}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker"),
    ({f"{NAME}.hada_w1_a": A}, "LoHa"),
    ({f"{NAME}.lokr_w1": A}, "LoKr"),
    ({f"{NAME}.dora_scale": torch.ones(5, 1)}, "DoRA"),
    ({f"{NAME}.oft_blocks": A}, "OFT"),
    ({f"{NAME}.diff": A}, "full difference"),
    ({f"{NAME}.diff_b": torch.ones(5)}, "full difference"),
    ({f"{NAME}.what": A}, "no LoRA factor"),
    ({"stray.weight": A}, "no LoRA factor"),
])  # fmt: skip
def test_what_is_not_lora_is_refused_by_its_name(tensors, said, tmp_path):
    with pytest.raises(CheckpointError, match=rf"'{re.escape(next(iter(tensors)))}' in .*{said}"):
        open_plain(file(tmp_path / "style.safetensors", FINE, tensors))


@pytest.mark.parametrize("tensors", [
    {f"{NAME}.lora_down.weight": A},
    {f"{NAME}.alpha": torch.tensor(1.0)},
    {f"{NAME}.lora_down.weight": A, f"{NAME}.lora_up.weight": torch.ones(5, 3)},
    {f"{NAME}.lora_down.weight": torch.ones(2), f"{NAME}.lora_up.weight": B},
    {f"{NAME}.lora_down.weight": torch.ones(0, 4), f"{NAME}.lora_up.weight": torch.ones(5, 0)},
    {f"{NAME}.lora_down.weight": A, f"{NAME}.lora_up.weight": torch.ones(5, 2, 3, 3)},
])  # fmt: skip
def test_factors_that_do_not_fit(tensors, tmp_path):
    with pytest.raises(CheckpointError, match=rf"'{NAME}' in '.*save the adapter again"):
        open_plain(file(tmp_path / "style.safetensors", tensors))


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(float("nan")), torch.ones(2)])
def test_an_alpha_that_is_no_positive_number(alpha, tmp_path):
    with pytest.raises(CheckpointError, match=rf"'{NAME}\.alpha' in .*positive number"):
        open_plain(file(tmp_path / "style.safetensors", FINE, {f"{NAME}.alpha": alpha}))
