"""Diffusion models under diffusers' names and under the original ones: identical weights, so no pair may differ."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.errors import DeltaspecError
from deltaspec.io.matrix import read_tensor
from deltaspec.types import MatrixSource
from deltaspec.workflows.analysis.analyze import make_plan
from deltaspec.workflows.merging.merge import merge
from tests.families import write

OPTIONS = deltaspec.AnalyzeOptions(device="cpu")
D = 8


def numbers():
    """Return a function that draws tensors, each unlike all others."""
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g)


def flux(double=3, single=5):
    """Return the same weights twice: in diffusers' naming, and in the original one, which fuses q, k, v and the MLP."""
    rnd, ours, theirs = numbers(), {}, {}

    def both(name, original, *shape):
        for leaf, size in (("weight", shape), ("bias", shape[:1])):
            ours[f"{name}.{leaf}"] = theirs[f"{original}.{leaf}"] = rnd(*size)

    def fused(names, original, heights):
        for leaf, size in (("weight", (D,)), ("bias", ())):
            parts = [rnd(height, *size) for height in heights]
            ours.update({f"{name}.{leaf}": part for name, part in zip(names, parts, strict=True)})
            theirs[f"{original}.{leaf}"] = torch.cat(parts)

    for name, original in (("timestep_embedder", "time_in"), ("text_embedder", "vector_in")):
        both(f"time_text_embed.{name}.linear_1", f"{original}.in_layer", D, D)
        both(f"time_text_embed.{name}.linear_2", f"{original}.out_layer", D, D)
    both("context_embedder", "txt_in", D, D)
    both("x_embedder", "img_in", D, 4)
    for i in range(double):
        one, other = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, norm, ff, add, out in (
            ("img", "norm1", "ff", "to_{}", "to_out.0"),
            ("txt", "norm1_context", "ff_context", "add_{}_proj", "to_add_out"),
        ):
            both(f"{one}.{norm}.linear", f"{other}.{side}_mod.lin", 6 * D, D)
            fused([f"{one}.attn.{add.format(r)}" for r in "qkv"], f"{other}.{side}_attn.qkv", [D] * 3)
            both(f"{one}.attn.{out}", f"{other}.{side}_attn.proj", D, D)
            both(f"{one}.{ff}.net.0.proj", f"{other}.{side}_mlp.0", 4 * D, D)
            both(f"{one}.{ff}.net.2", f"{other}.{side}_mlp.2", D, 4 * D)
    for i in range(single):
        one, other = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        both(f"{one}.norm.linear", f"{other}.modulation.lin", 3 * D, D)
        names = [*(f"{one}.attn.to_{r}" for r in "qkv"), f"{one}.proj_mlp"]
        fused(names, f"{other}.linear1", [D, D, D, 4 * D])
        both(f"{one}.proj_out", f"{other}.linear2", D, 5 * D)
    both("proj_out", "final_layer.linear", 4, D)
    return ours, theirs


def vae(prefix="first_stage_model."):
    """Return the same VAE twice: the original names number the decoder's blocks from the other end."""
    rnd, ours, theirs = numbers(), {}, {}

    def both(name, original, *shape):
        for leaf, size in (("weight", shape), ("bias", shape[:1])):
            ours[f"{name}.{leaf}"] = theirs[f"{prefix}{original}.{leaf}"] = rnd(*size)

    def resnet(name, original):
        for n in (1, 2):
            both(f"{name}.norm{n}", f"{original}.norm{n}", D)
            both(f"{name}.conv{n}", f"{original}.conv{n}", D, D, 3, 3)

    for side, ups, count in (("encoder", "down", 2), ("decoder", "up", 3)):
        both(f"{side}.conv_in", f"{side}.conv_in", D, 4, 3, 3)
        for i, j in itertools.product(range(4), range(count)):
            other = i if side == "encoder" else 3 - i
            resnet(f"{side}.{ups}_blocks.{i}.resnets.{j}", f"{side}.{ups}.{other}.block.{j}")
        for i in range(3):
            other = i if side == "encoder" else 3 - i
            both(f"{side}.{ups}_blocks.{i}.{ups}samplers.0.conv", f"{side}.{ups}.{other}.{ups}sample.conv", D, D, 3, 3)
        for n in range(2):
            resnet(f"{side}.mid_block.resnets.{n}", f"{side}.mid.block_{n + 1}")
        both(f"{side}.mid_block.attentions.0.group_norm", f"{side}.mid.attn_1.norm", D)
        for name, original in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            both(f"{side}.mid_block.attentions.0.{name}", f"{side}.mid.attn_1.{original}", D, D)
        both(f"{side}.conv_norm_out", f"{side}.norm_out", D)
        both(f"{side}.conv_out", f"{side}.conv_out", 3, D, 3, 3)
    return ours, theirs


def unet(depth=3):
    """Return the same UNet twice: in diffusers' naming, and in that of the first Stable Diffusion."""
    rnd, ours, theirs = numbers(), {}, {}
    for i, (j, role) in itertools.product(range(1, depth), itertools.product(range(2), "qkv")):
        for attention in (1, 2):
            w = rnd(D, D)
            inner = f"transformer_blocks.0.attn{attention}.to_{role}.weight"
            ours[f"down_blocks.{i}.attentions.{j}.{inner}"] = w
            theirs[f"model.diffusion_model.input_blocks.{3 * i + 1 + j}.1.{inner}"] = w
            back = rnd(D, D)
            ours[f"up_blocks.{i}.attentions.{j}.{inner}"] = back
            theirs[f"model.diffusion_model.output_blocks.{3 * i + j}.1.{inner}"] = back
    return ours, theirs


MODELS = {
    "flux": flux(),
    "flux of as many single blocks as double ones": flux(4, 4),
    "flux of more single blocks": flux(2, 20),
    "vae": vae(),
    "vae by itself": vae(""),
    "unet": unet(),
}


def content(source):
    return source.view.read(read_tensor(source.spec))


@pytest.mark.parametrize(
    "config", [{}, {"_class_name": "FluxTransformer2DModel"}, {"_class_name": "UNet2DConditionModel"}]
)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_identical_weights_are_a_refusal_or_no_change(name, turned, config, tmp_path):
    states = MODELS[name][::-1] if turned else MODELS[name]
    folders = [
        write(tmp_path / side, {n: t.clone() for n, t in s.items()}, config)
        for side, s in zip("bt", states, strict=True)
    ]
    try:
        plan, *_ = make_plan(*folders, OPTIONS)
    except DeltaspecError as error:
        assert "pair" in str(error)
        return
    for pair in plan.pairs:
        assert isinstance(pair.base, MatrixSource) and isinstance(pair.tuned, MatrixSource)
        assert torch.equal(content(pair.base), content(pair.tuned)), (pair.base.spec.name, pair.tuned.spec.name)
    for vector in plan.vectors:
        assert torch.equal(read_tensor(vector.base), read_tensor(vector.tuned)), (vector.base.name, vector.tuned.name)


@pytest.mark.parametrize(
    "targets",
    [
        ["transformer_blocks.1.ff.net.2"],
        ["transformer_blocks.0.attn.to_q"],
        ["single_transformer_blocks.1.proj_out", "single_transformer_blocks.3.proj_out"],
        ["x_embedder"],
        [
            f"transformer_blocks.{i}.{ff}.net.{n}"
            for i in range(3)
            for ff in ("ff", "ff_context")
            for n in ("0.proj", "2")
        ],
    ],
)
def test_an_adapter_of_the_other_naming_is_refused(targets, tmp_path):
    ours, theirs = MODELS["flux"]
    state = {}
    for target in targets:
        d_out, d_in = ours[f"{target}.weight"].shape
        state[f"base_model.model.{target}.lora_A.weight"] = torch.randn(2, d_in)
        state[f"base_model.model.{target}.lora_B.weight"] = torch.randn(d_out, 2)
    (tmp_path / "a").mkdir()
    save_file(state, tmp_path / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, tmp_path / "flux.safetensors")
    with pytest.raises(DeltaspecError):
        merge(tmp_path / "flux.safetensors", [tmp_path / "a"], tmp_path / "m.safetensors")
    save_file({name: tensor.clone() for name, tensor in ours.items()}, tmp_path / "own.safetensors")
    merge(tmp_path / "own.safetensors", [tmp_path / "a"], tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    assert {n for n in ours if not torch.equal(merged[n], ours[n])} == {f"{target}.weight" for target in targets}


def test_the_maps_that_a_user_writes_pair_what_they_name(tmp_path):
    """One kind of layer at a time: what is mapped is compared, and equal."""
    ours, theirs = MODELS["flux"]
    folders = [
        write(tmp_path / side, {n: t.clone() for n, t in s.items()}, {}) for side, s in (("b", ours), ("t", theirs))
    ]
    maps = tuple(
        f"double_blocks.{i}.{side}_mlp.{n}=transformer_blocks.{i}.{ff}.net.{leaf}"
        for i in range(3)
        for side, ff in (("img", "ff"), ("txt", "ff_context"))
        for n, leaf in ((0, "0.proj"), (2, "2"))
    )
    options = deltaspec.AnalyzeOptions(device="cpu", pairing=deltaspec.PairOptions(map=maps))
    plan, *_ = make_plan(*folders, options)
    assert len(plan.pairs) == 12
    assert all(torch.equal(content(pair.base), content(pair.tuned)) for pair in plan.pairs)
