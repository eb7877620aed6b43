"""How LoRA runs: what it starts as, what it never makes, where it acts, and what it leaves as it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deltaspec.training.methods.lora.adapted_linear import Factors
from deltaspec.training.methods.lora.dora import row_lengths, square_rows
from deltaspec.training.methods.lora.update import LinearLora
from deltaspec.training.sites.adapted import Adapted
from deltaspec.training.sites.attachment import Attachment, freeze
from deltaspec.training.sites.model_sites import base_parameters
from deltaspec.types import LowRankDelta
from tests.tiny_models import build
from tests.training.methods.lora_models import VARIANTS, move, outputs, run, start


def gradients(model: Any, attachment: Attachment) -> dict[str, Tensor]:
    y = run(model)
    (y.float() * torch.randn(y.shape, generator=torch.Generator().manual_seed(6))).sum().backward()
    found = {name: parameter.grad for name, parameter in attachment.trained().items()}
    for parameter in attachment.trained().values():
        parameter.grad = None
    return found


def dense(attachment: Attachment, site: Any) -> Tensor:
    delta = attachment.delta(site)
    return delta.lora_B @ delta.lora_A if isinstance(delta, LowRankDelta) else delta


def add(module: nn.Module, site: Any, change: Tensor) -> None:
    """W + ΔW in place, by the view's own definition."""
    with torch.no_grad():
        matrix = module.weight.T if site.kind == "conv1d" else module.weight
        rows = torch.arange(matrix.shape[0]).reshape(site.view.groups, -1)[:, site.view.start : site.view.stop]
        matrix[rows.flatten()] += change.to(matrix)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "classifier"])
def test_starts_as_the_identity_and_leaves_no_trace(kind: str, variant: str) -> None:
    """Outputs are the base's at the start and after; modules, values, flags and gradients are what they were."""
    model = build(kind)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    plain = outputs(model)
    targets = "all" if "biases" in variant else "all,embed"
    attachment = start(model, targets, **VARIANTS[variant])
    exact = 0.0 if "pissa" not in variant and "dora" not in variant and "biases" not in variant else 2e-6
    assert float((outputs(model) - plain).abs().max()) <= exact * float(plain.abs().max())
    assert {name: p.requires_grad for name, p in base_parameters(model).items()} == flags
    freeze(model)
    move(attachment)
    gradients(model, attachment)
    assert all(parameter.grad is None for parameter in base_parameters(model).values())
    assert float((outputs(model) - plain).abs().max()) > 1e-2
    attachment.enable(0)
    assert torch.equal(outputs(model), plain)
    attachment.detach()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func._schema.name in ("aten::t", "aten::transpose", "aten::detach", "aten::alias", "aten::view")
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not views:
                self.made.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa", "dora": True}])
def test_never_makes_a_matrix_of_the_weights_shape(
    options: dict[str, Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither B·A, nor its gradient, nor that of W: in a step, nothing has the shape of a weight or its transpose."""
    model = build("llama", hidden_size=20, intermediate_size=28, num_attention_heads=2, num_key_value_heads=1)
    freeze(model)
    attachment = move(start(model, **options))
    if not fused:
        monkeypatch.setattr(LinearLora, "fuse", lambda *_, **__: None)
    with Shapes() as shapes:
        gradients(model, attachment)
    weights = {site.shape for site in attachment.sites} | {site.shape[::-1] for site in attachment.sites}
    assert (3, 20) in shapes.made or (6, 20) in shapes.made  # the gradient of A
    assert not weights & shapes.made


def test_row_lengths_are_the_dense_ones() -> None:
    """Lengths of W + s·B·A without the sum: 4 eps where the update is small or large; bounded where it cancels W."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float32).eps
    for size in (0.0, 1e-3, 1.0, 30.0):
        weight = torch.randn(96, 160, generator=generator)
        lora_A, lora_B = torch.randn(8, 160, generator=generator), size * torch.randn(96, 8, generator=generator)
        found = row_lengths(weight, square_rows(weight).float(), Factors(lora_A, lora_B, 0.7))
        wanted = np.linalg.norm(
            weight.double().numpy() + 0.7 * (lora_B.double().numpy() @ lora_A.double().numpy()), axis=1
        )
        assert np.abs(found.numpy() / wanted - 1).max() <= 4 * eps
    lora_A = torch.linalg.qr(torch.randn(160, 8, generator=generator))[0].T.contiguous()
    lora_B = torch.randn(96, 8, generator=generator)
    weight = -0.99 * lora_B @ lora_A  # the update all but cancels the rows: (‖w‖ + ‖s·b·A‖)² is 40,000 length²
    found = row_lengths(weight, square_rows(weight).float(), Factors(lora_A, lora_B, 1.0))
    wanted = np.linalg.norm(weight.double().numpy() + lora_B.double().numpy() @ lora_A.double().numpy(), axis=1)
    assert np.abs(found.numpy() / wanted - 1).max() <= 40_000 * eps


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"lora_bias": True}])
def test_parts_of_fused_matrices(options: dict[str, Any]) -> None:
    """q and v of GPT-2's c_attn get updates of their own: as if ΔW were added to their rows, also when split off."""
    model = build("gpt2")
    other = copy.deepcopy(model)
    attachment = move(start(model, "q_proj,v_proj", **options))
    assert len(attachment.sites) == 4
    assert not any(site.whole for site in attachment.sites)
    for site in attachment.sites:
        module = other.get_submodule(site.path)
        add(module, site, dense(attachment, site))
        if options.get("lora_bias"):
            update = attachment.updates[site.name]
            with torch.no_grad():
                module.bias[site.view.start : site.view.stop] += 7 / 3 * update.biases.shift
    assert torch.allclose(outputs(model), outputs(other), rtol=0, atol=1e-5)


def test_fused_and_plain_steps_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation or the sum of its parts: the same outputs and gradients, also recomputed and at other weights."""
    for kind, options in (("llama", {}), ("gpt2", {"dora": True}), ("gpt2", {"lora_bias": True, "bias": "lora_only"})):
        for weight in (1.0, 0.4):
            model = build(kind)
            freeze(model)
            attachment = move(start(model, **options))
            attachment.enable(weight)
            fused, wanted = gradients(model, attachment), outputs(model)
            layers = model.model.layers if kind == "llama" else model.transformer.h
            forwards = [layer.forward for layer in layers]
            for layer, forward in zip(layers, forwards, strict=True):
                layer.forward = lambda *args, f=forward, **kw: checkpoint(f, *args, use_reentrant=False, **kw)
            assert all(torch.equal(grad, fused[name]) for name, grad in gradients(model, attachment).items())
            for layer in layers:
                del layer.forward
            with monkeypatch.context() as patch:
                patch.setattr(LinearLora, "fuse", lambda *_, **__: None)
                assert torch.allclose(outputs(model), wanted, rtol=0, atol=1e-5)
                for name, gradient in gradients(model, attachment).items():
                    assert float((gradient - fused[name]).norm()) <= 1e-5 * float(gradient.norm()), (kind, name)


def test_two_adapters_add_up() -> None:
    """Weights scale each ΔW; what one of them does is not changed by the other."""
    model = build("llama")
    base = copy.deepcopy(model)
    one, two = move(start(model, name="one")), move(start(model, "mlp", name="two", seed=4, rank=2))
    one.enable(0.5)
    two.enable(-1.5)
    for attachment, weight in ((one, 0.5), (two, -1.5)):
        for site in attachment.sites:
            add(base.get_submodule(site.path), site, weight * dense(attachment, site))
    assert torch.allclose(outputs(model), outputs(base), rtol=0, atol=1e-5)
    one.detach()
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), Adapted)
    assert not isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), Adapted)


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_mixed_precision(options: dict[str, Any]) -> None:
    """Under autocast outputs come in bf16's rounding of float32's, and gradients arrive in float32."""
    model = build("gpt2")
    freeze(model)
    attachment = move(start(model, "all,embed", **options), 0.05)
    wanted, exact = outputs(model), gradients(model, attachment)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model)
    with torch.autocast("cpu", torch.bfloat16):  # a block of its own: torch may reuse casts made without gradients
        rough = gradients(model, attachment)
    assert float((found.float() - wanted).norm()) <= 2**-6 * float(wanted.norm())
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - exact[name]).norm()) <= 0.1 * float(exact[name].norm()), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiles_whole() -> None:
    """One graph without breaks gives the eager outputs and gradients."""
    model = build("llama", num_hidden_layers=1)
    freeze(model)
    attachment = move(start(model, dora=True))
    wanted, seen = gradients(model, attachment), []
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled.register_forward_hook(lambda module, given, out: seen.append(out.logits.detach()))
    for name, gradient in gradients(compiled, attachment).items():
        assert float((gradient - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm())
    assert torch.allclose(seen[0], outputs(model), rtol=0, atol=1e-5)
