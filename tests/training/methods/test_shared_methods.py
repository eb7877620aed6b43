"""Methods whose layers share parameters, against PEFT and against dense float64 arithmetic."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.attachment import Attachment, freeze
from deltaspec.training.sites.model_sites import base_matrix, module_at
from deltaspec.training.sites.targets import choose_sites
from deltaspec.types import LowRankDelta
from deltaspec.workflows.training.saved_adapters import load_adapter, save_adapter
from tests import tiny_models

IDS = torch.tensor([[5, 7, 9, 11, 6, 8], [20, 4, 10, 3, 12, 14]])
PLACES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "masked": ["query", "dense"]}
PEFT_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "vera": (peft.VeraConfig, {"r": 5, "projection_prng_key": 3}),
    "vera-drawn": (peft.VeraConfig, {"r": 5, "projection_prng_key": 3, "save_projection": False}),
    "vblora": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 3}),
    "vblora-topk": (
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 3, "save_only_topk_weights": True},
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 5},
    "tied": {"rank": 3},
    "vblora": {"rank": 2, "vectors": 12, "vector_length": 8, "topk": 3},
    "lora_xs": {"rank": 3},
}


def attach(model: Any, method: str, *, targets: str = "all", split: bool = False, **options: Any) -> Attachment:
    freeze(model)
    sites = choose_sites(model, TargetOptions(targets, split=split))
    line = METHODS[method]
    return line.attach(model, sites, line.options(**{**OPTIONS[method], **options}), name="mine", seed=7)


def move(parameters: Any, *, size: float = 0.3) -> None:
    """Perturb what is trained, so that no zero hides a bug."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def output(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns about Conv1D, drawn projections and deprecated names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def gradients(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    (output(model) * torch.linspace(-1, 1, 6)[:, None]).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def of_peft(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT trains, under the names of its files."""
    names = {name.removesuffix(".default"): p for name, p in model.named_parameters() if p.requires_grad}
    bank = "vblora_vector_bank"  # listed once, where it is first met
    return {f"base_model.{bank}" if name.endswith(bank) else name: parameter for name, parameter in names.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2", "masked"])
@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_files_of_peft_give_the_same_outputs_and_gradients(case: str, family: str, tmp_path: Path) -> None:
    config, settings = PEFT_CONFIGS[case]
    settings = {"target_modules": PLACES[family], **settings}
    theirs = quietly(peft.get_peft_model, tiny_models.build(family), quietly(config, **settings))
    move([p for p in theirs.parameters() if p.requires_grad])
    quietly(theirs.save_pretrained, tmp_path)
    mine = tiny_models.build(family)
    plain = output(mine)
    freeze(mine)
    attachment = load_adapter(mine, tmp_path)
    expected = output(theirs)
    assert float((output(mine) - expected).detach().abs().max()) <= 1e-5
    assert float((expected - plain).detach().abs().max()) > 1e-2
    wanted = gradients(theirs, of_peft(theirs))
    found = gradients(mine, dict(attachment.trained()))
    assert found.keys() == wanted.keys()
    if case != "vblora-topk":  # logits of vectors that were not kept are gone
        assert all(close(found[name], wanted[name]) for name in wanted)
    else:
        with pytest.raises(CheckpointError, match="saved with its 3 best weights"):
            attachment.groups()


@pytest.mark.parametrize("family", ["llama", "gpt2", "masked"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("vera", {}), ("vera", {"save_projection": False}), ("vblora", {}), ("vblora", {"save_topk": True})],
)
def test_files_of_ours_load_into_peft(method: str, options: dict[str, Any], family: str, tmp_path: Path) -> None:
    mine = tiny_models.build(family)
    attachment = attach(mine, method, **options)
    move(attachment.trained().values())
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    theirs = quietly(peft.PeftModel.from_pretrained, tiny_models.build(family), tmp_path)
    assert float((output(mine) - output(theirs)).detach().abs().max()) <= 1e-5
    again = tiny_models.build(family)
    back = load_adapter(again, tmp_path, name="again")
    assert float((output(mine) - output(again)).detach().abs().max()) <= (1e-5 if options else 0)
    assert back.released().keys() == attachment.released().keys()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_is_vera_with_trained_projections(family: str, tmp_path: Path) -> None:
    mine = tiny_models.build(family)
    attachment = attach(mine, "tied")
    move(attachment.trained().values())
    first, second = attachment.shared["base_model.tied_A"], attachment.shared["base_model.tied_B"]
    sides = [max(site.shape[axis] for site in attachment.sites) for axis in (0, 1)]
    assert first.shape == (3, 16) and second.shape == (16, 3)  # the model's width, although FFN layers are wider
    assert max(sides) > 16
    tensors = {
        name.replace("tied_", "vera_"): tensor.detach()
        for name, tensor in attachment.state().items()
        if name not in attachment.shared
    }
    tensors["base_model.vera_A"] = torch.cat([first.detach()] * 4, 1)[:, : sides[1]].contiguous()
    tensors["base_model.vera_B"] = torch.cat([second.detach()] * 4)[: sides[0]].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "VERA", "r": 3, "target_modules": [site.path for site in attachment.sites]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = quietly(peft.PeftModel.from_pretrained, tiny_models.build(family), tmp_path, is_trainable=True)
    assert float((output(mine) - output(theirs)).detach().abs().max()) <= 1e-5
    wanted = gradients(theirs, of_peft(theirs))
    found = gradients(mine, dict(attachment.trained()))
    assert all(close(found[name.replace("vera_", "tied_")], gradient) for name, gradient in wanted.items())


def test_the_tied_pair_gets_the_gradient_of_every_use() -> None:
    model = tiny_models.build("masked").double()
    attachment = attach(model, "tied")
    for update in attachment.updates.values():
        update.double()
    move(attachment.trained().values())
    chosen = attachment.shared["base_model.tied_A"]
    found = gradients(model, dict(attachment.trained()))["base_model.tied_A"]
    step = torch.zeros_like(chosen)
    step[1, 5] = 1e-6

    def loss() -> float:
        return float((output(model) * torch.linspace(-1, 1, 6)[:, None]).square().mean().detach())

    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            chosen += sign * step
            ends.append(loss())
            chosen -= sign * step
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(found[1, 5]), rel=1e-5)


@pytest.mark.parametrize(("family", "targets"), [("llama", "all"), ("gpt2", "all"), ("llama", "embed,q_proj")])
def test_lora_xs_is_what_the_dense_arithmetic_says(family: str, targets: str) -> None:
    mine = tiny_models.build(family)
    plain = output(mine)
    attachment = attach(mine, "lora_xs", targets=targets)
    assert torch.equal(output(mine), plain)
    move(attachment.trained().values())
    dense = tiny_models.build(family).double()
    for name, update in attachment.updates.items():
        module = dense.get_submodule(name)
        stored = module.weight if update.site.kind != "conv1d" else module.weight.T
        left, values, right = torch.linalg.svd(stored.detach(), full_matrices=False)
        sign = ((right[:3] * update.A.double()).sum(1)).sign()  # vectors are unique up to it
        expected = (left[:, :3] * values[:3] * sign) @ update.R.detach().double() @ (right[:3] * sign[:, None])
        delta = attachment.delta(update.site)
        assert isinstance(delta, LowRankDelta)
        assert float((delta.lora_B @ delta.lora_A - expected).norm() / expected.norm()) < 1e-5
        with torch.no_grad():
            stored += expected
    assert float((output(mine) - output(dense)).detach().abs().max()) <= 1e-4
    assert float((output(mine) - plain).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_delta_is_what_acts_and_shared_tensors_are_one(method: str, split: bool, tmp_path: Path) -> None:
    mine = tiny_models.build("gpt2")
    plain = output(mine)
    attachment = attach(mine, method, split=split)
    assert torch.equal(output(mine), plain) == METHODS[method].identity
    move(attachment.trained().values())
    assert any(not site.whole for site in attachment.sites) == split
    for name, shared in attachment.shared.items():
        held = {id(t) for update in attachment.updates.values() for t in update.parameters() if t.shape == shared.shape}
        assert id(shared) in held and sum(t is shared for t in attachment.state().values()) == 1, name
    merged = tiny_models.build("gpt2")
    with torch.no_grad():
        for site in attachment.sites:
            delta = attachment.delta(site)
            assert isinstance(delta, LowRankDelta)
            base_matrix(module_at(merged, site.path), site).add_(delta.lora_B @ delta.lora_A)
    assert float((output(merged) - output(mine)).detach().abs().max()) <= 1e-4
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert kind.startswith("DELTASPEC_") == (split or not METHODS[method].peft)
    again = tiny_models.build("gpt2")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(mine))


@pytest.mark.parametrize("options", [{}, {"vectors": 300}, {"vectors": 300, "index_bytes": 4}, {"topk": 1}])
def test_stored_counts_the_bytes_of_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    attachment = attach(tiny_models.build("llama"), "vblora", save_topk=True, **options)
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert attachment.stored() * 4 == sum(t.numel() * t.element_size() for t in tensors.values())
    other = attach(tiny_models.build("llama"), "vera", save_projection=False)
    assert other.stored() == sum(site.shape[0] + 5 for site in other.sites)


def test_vblora_learns_its_logits_ten_times_faster_and_keeps_them_to_go_on() -> None:
    attachment = attach(tiny_models.build("llama"), "vblora")
    bank, logits = attachment.groups()
    assert [p.shape for p in bank.parameters] == [(12, 8)] and bank.factor == 1
    assert logits.factor == 10 and len(logits.parameters) == 2 * len(attachment.sites)
    assert all("logits" in name or "bank" in name for name in attachment.state())
    assert sum(p.numel() for p in attachment.trained().values()) == 12 * 8 + 12 * sum(
        2 * sum(site.shape) // 8 for site in attachment.sites
    )


def test_negative_last_weights_are_zero_and_worse_ones_refused() -> None:
    attachment = attach(tiny_models.build("llama"), "vblora", save_topk=True)
    stored = {name: tensor.detach().clone() for name, tensor in attachment.released().items()}
    weights = next(name for name in stored if name.endswith("_topk_weights"))
    stored[weights][0, 0] = torch.tensor([0.75, 0.25 + 6e-8])
    assert float(1 - stored[weights][0, 0].sum()) <= 0
    attachment.load(stored)
    kept = attachment.state()[weights.removesuffix("_topk_weights")][0, 0].softmax(-1)
    assert torch.isfinite(kept).all()
    assert sorted(kept.tolist())[-2:] == pytest.approx([0.25, 0.75])
    indices = weights.replace("weights", "indices")
    for name, wrong in ((weights, 0.9), (weights, -0.1), (indices, 12)):
        damaged = {**stored, name: torch.full_like(stored[name], wrong)}
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            attachment.load(damaged)


def test_released_weights_never_exceed_one_so_that_peft_reads_them(tmp_path: Path) -> None:
    mine = tiny_models.build("llama")
    attachment = attach(mine, "vblora", rank=8, vector_length=2, topk=8, save_topk=True)
    move((p for name, p in attachment.trained().items() if "logits" in name), size=8.0)
    logits = [p for name, p in attachment.trained().items() if "logits" in name]
    assert any(bool((p.topk(8).values.softmax(-1)[..., :-1].sum(-1) > 1).any()) for p in logits)
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    theirs = quietly(peft.PeftModel.from_pretrained, tiny_models.build("llama"), tmp_path)
    assert float((output(mine) - output(theirs)).detach().abs().max()) <= 1e-5
    attachment.load({name: tensor.detach().clone() for name, tensor in attachment.state().items()})  # as a resume does


def test_what_makes_no_sense_is_refused_before_anything_is_made() -> None:
    model = tiny_models.build("llama")
    before = [type(module) for module in model.modules()]
    for method, options, targets, message in (
        ("vblora", {"vector_length": 16}, "all", "does not divide the 8 × 16 of 'model.layers.0.self_attn.k_proj'"),
        ("vera", {}, "embed", "is an embedding"),
        ("vblora", {}, "embed", "is an embedding"),
        ("tied", {}, "embed", "is an embedding"),
        ("lora_xs", {"rank": 9}, "all", "--rank is 9"),
        ("tied", {"rank": 9}, "all", "--rank is 9"),
    ):
        with pytest.raises(OptionError, match=message):
            attach(model, method, targets=targets, **options)
    assert [type(module) for module in model.modules()] == before
    for method, options in (
        ("vblora", {"topk": 13}),
        ("vblora", {"topk": 0}),
        ("vblora", {"index_bytes": 3}),
        ("vblora", {"vectors": 300, "index_bytes": 1}),
        ("vera", {"rank": 0}),
        ("vera", {"dropout": 1.0}),
        ("vera", {"projection_prng_key": -1}),
    ):
        with pytest.raises(OptionError):
            METHODS[method].options(**{**OPTIONS[method], **options})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_in_bfloat16_the_updates_stay_float32(method: str, autocast: bool) -> None:
    model = tiny_models.build("llama")
    model = model if autocast else model.bfloat16()
    attachment = attach(model, method)
    move(attachment.trained().values())
    assert {p.dtype for p in attachment.trained().values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = output(model)
    found.float().square().mean().backward()
    assert found.dtype == torch.bfloat16
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in attachment.trained().values())
