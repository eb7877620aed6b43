"""LoRA and its relatives against PEFT: its files here, ours there; the same outputs, gradients and merged weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deltaspec.architecture.peft_names import PREFIX
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import module_at
from deltaspec.training.sites.site import Site
from deltaspec.types import LowRankDelta
from deltaspec.workflows.training.saved_adapters import load_adapter, save_adapter
from tests.tiny_models import VOCAB, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* LoRA tensor.* have invalid shape"),  # of lora_bias
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]
LLAMA = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
BERT = ["query", "word_embeddings", "intermediate.dense"]


@dataclass
class Case:
    model: str
    targets: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    merged: float = 1e-12  # how well PEFT's merged weights, in float64, can be known


CASES = {
    "lora": Case("llama", LLAMA),
    "rslora": Case("llama", LLAMA, {"use_rslora": True}),
    "dora": Case("llama", LLAMA, {"use_dora": True}),
    "pissa": Case("llama", LLAMA, {"init_lora_weights": "pissa"}, 1e-5),
    "pissa rslora": Case("llama", LLAMA, {"init_lora_weights": "pissa", "use_rslora": True}, 1e-5),
    "pissa dora": Case("llama", LLAMA, {"init_lora_weights": "pissa", "use_dora": True}, 1e-5),
    "patterns": Case("llama", LLAMA, {"rank_pattern": {"q_proj": 5, "1.mlp.*": 2}, "alpha_pattern": {"v_proj": 11}}),
    "conv1d": Case("gpt2", ["c_attn", "c_fc", "c_proj"], {"lora_bias": True}),
    "conv1d dora": Case("gpt2", ["c_attn", "c_fc", "c_proj"], {"use_dora": True}),
    "conv1d pissa": Case("gpt2", ["c_attn", "c_fc", "c_proj"], {"init_lora_weights": "pissa"}, 1e-5),
    "embedding": Case("classifier", BERT),
    "embedding rslora": Case("gpt2", ["wte", "c_attn"], {"use_rslora": True}),
    "embedding dora": Case("classifier", BERT, {"use_dora": True}),
    "embedding pissa": Case("classifier", BERT, {"init_lora_weights": "pissa"}, 1e-5),
    "lora_bias": Case("classifier", ["query", "intermediate.dense"], {"lora_bias": True}),
    "bias lora_only": Case("classifier", ["query", "intermediate.dense"], {"bias": "lora_only"}),
    "bias all dora": Case("bert", ["query", "intermediate.dense"], {"bias": "all", "use_dora": True}),
}
LOW = ["lora", "dora", "conv1d dora", "embedding", "embedding dora"]


def inputs() -> Tensor:
    return torch.randint(0, len(VOCAB), (3, 7), generator=torch.Generator().manual_seed(5))


def run(model: Any) -> Tensor:
    out = model(input_ids=inputs())
    return out.logits if "logits" in out else torch.cat([out.last_hidden_state, out.pooler_output[:, None]], dim=1)


def backward(model: Any) -> Tensor:
    y = run(model)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    (y.float() * weights).sum().backward()
    return y.detach()


def wrap_peft(case: Case, base: Any) -> Any:
    """PEFT's model with every trainable tensor moved."""
    import peft

    config = {"r": 3, "lora_alpha": 7, "target_modules": case.targets, **case.config}
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def split_exactly(case: Case, base: Any, folder: Path) -> Any:
    """PEFT in float64 on the residual that NumPy finds: PEFT's own, from a float32 SVD, is off by up to 4e-5."""
    import peft

    config = peft.LoraConfig.from_pretrained(folder)
    config.init_lora_weights = True
    for name, module in base.named_modules():
        if name.endswith(tuple(case.targets)) and not isinstance(module, nn.Embedding):
            u, s, vt = np.linalg.svd(module.weight.detach().double().numpy(), full_matrices=False)
            s[: config.r] = 0
            module.weight.data = torch.from_numpy((u * s) @ vt)
    model = peft.PeftModel.from_pretrained(base, folder, config=config, is_trainable=True)
    return model.double().eval()


def assert_same_gradients(attachment: Attachment, theirs: Any, tolerance: float = 1e-5) -> None:
    """Each tensor's, relative to its norm; some (a key's bias) are zero but for the rounding of the others."""
    own = attachment.trained()
    gradients = {stored_name(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    rounding = 1e-7 * max(float(gradient.norm()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert own[key].grad is not None, key
        distance = float((own[key].grad.double() - gradient.double()).norm())
        assert distance <= tolerance * float(gradient.norm()) + rounding, (key, distance)


def stored_name(name: str) -> str:
    """The name in a file of one of PEFT's parameters."""
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def dense(attachment: Attachment, site: Site) -> Tensor:
    delta = attachment.delta(site)
    assert delta is not None
    return delta.lora_B @ delta.lora_A if isinstance(delta, LowRankDelta) else delta


def near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((one.double() - other.double()).norm()) <= tolerance * float(other.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_peft_files(name: str, tmp_path: Path) -> None:
    """PEFT's files give the same logits and gradients here, ours the same logits there."""
    import peft

    case = CASES[name]
    theirs = wrap_peft(case, build(case.model))
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = backward(theirs)
    model = build(case.model)
    plain = run(model).detach()
    assert float((wanted - plain).abs().max()) > 1e-2
    attachment = load_adapter(model, tmp_path / "theirs")
    attachment_free(attachment, model)
    found = backward(model)
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    if "pissa" in name:
        theirs = split_exactly(case, build(case.model), tmp_path / "theirs")
        assert float((found - backward(theirs)).abs().max()) <= 1e-5
    assert_same_gradients(attachment, theirs)
    save_adapter(tmp_path / "ours", attachment, base="", task_type=None, heads={})
    again = peft.PeftModel.from_pretrained(build(case.model), tmp_path / "ours").eval()
    with torch.no_grad():
        assert float((run(again) - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    back = build(case.model)
    load_adapter(back, tmp_path / "ours")
    assert float((run(back).detach() - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


def attachment_free(attachment: Attachment, model: nn.Module) -> None:
    """Only the adapter is trained."""
    own = {id(p) for p in attachment.trained().values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


@pytest.mark.parametrize("name", CASES)
def test_delta(name: str, tmp_path: Path) -> None:
    """ΔW is PEFT's merged weight minus the base's, in float64; of PiSSA to the rounding of PEFT's float32 residual."""
    case = CASES[name]
    base = build(case.model)
    theirs = wrap_peft(case, copy.deepcopy(base))
    theirs.save_pretrained(tmp_path)
    merged = theirs.double().merge_and_unload()
    attachment = load_adapter(base, tmp_path)
    assert attachment.sites
    for site in attachment.sites:
        module = module_at(base, site.path)
        change = merged.get_submodule(site.path).weight.detach() - module.weight.detach().double()
        change = change.T if site.kind == "conv1d" else change
        assert change.shape == site.shape
        assert float((dense(attachment, site) - change).abs().max()) <= case.merged * float(change.abs().max())


@pytest.mark.parametrize("name", LOW)
def test_bfloat16_base(name: str, tmp_path: Path) -> None:
    """A bf16 base with float32 factors: PEFT's outputs and gradients to bf16's rounding."""
    case = CASES[name]
    theirs = wrap_peft(case, build(case.model).bfloat16())
    theirs.save_pretrained(tmp_path)
    wanted = backward(theirs)
    model = build(case.model).bfloat16()
    attachment = load_adapter(model, tmp_path)
    attachment_free(attachment, model)
    assert all(p.dtype == torch.float32 for p in attachment.trained().values())
    found = backward(model)
    assert found.dtype == torch.bfloat16
    assert near(found, wanted, 2**-6)
    assert_same_gradients(attachment, theirs, 2**-4)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout(dora: bool, tmp_path: Path) -> None:
    """The same inputs are dropped at the same places as by PEFT, given the same seed."""
    case = Case("llama", LLAMA, {"use_dora": dora, "lora_dropout": 0.3})
    theirs = wrap_peft(case, build("llama")).train()
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(11)
    wanted = backward(theirs)
    model = build("llama").train()
    attachment = load_adapter(model, tmp_path)
    model.train()
    torch.manual_seed(11)
    found = backward(model)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert_same_gradients(attachment, theirs)
    assert float((run(model.eval()).detach() - wanted).abs().max()) > 1e-3


def test_pissa_keeps_its_start(tmp_path: Path) -> None:
    """What is trained on can be taken up again from its state; what is released fits the base as it is."""
    case = CASES["pissa"]
    theirs = wrap_peft(case, build("llama"))
    theirs.save_pretrained(tmp_path)
    one, other = build("llama"), build("llama")
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    attachment = load_adapter(one, tmp_path)
    state = {key: tensor.detach().clone() for key, tensor in attachment.state().items()}
    taken = load_adapter(other, tmp_path)
    with torch.no_grad():
        for tensor in taken.state().values():
            tensor.zero_()
    taken.load(state)
    assert torch.equal(run(other), run(one))
    name = f"{PREFIX}model.layers.0.self_attn.q_proj"
    assert attachment.released()[f"{name}.lora_A.weight"].shape[0] == 2 * state[f"{name}.lora_A.weight"].shape[0]
    attachment.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.state_dict().items())
