"""What each module of a model is to LoRA: a kind that takes factors, or a reason why it takes none."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaspec.architecture.outline.reads import ASIDE, ELSEWHERE, READ, Uses
from deltaspec.types import Holder

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS: tuple[tuple[str, Any], ...] = (
    ("linear", nn.Linear),
    ("embedding", nn.Embedding),
    *(("conv", cls) for cls in CONVS),
)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # PEFT saves none of these whole
MAMBAS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # in which PEFT refuses out_proj and conv1d


def describe_holders(model: nn.Module, uses: Uses) -> dict[str, Holder]:
    """Say of every module that has parameters of its own what it is, given what the model's code does with it."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reason = uses.taken.get(path, "")
        if not reason and kind in MAMBAS and path.rpartition(".")[2] in ("out_proj", "conv1d"):
            reason = f"PEFT refuses modules of this name in a {kind}"
        read, typed = reason in (READ, ELSEWHERE, ASIDE), path in uses.typed or isinstance(module, CONTAINERS)
        turned = bool(getattr(module, "is_transposed", False))
        found[path] = Holder(type(module).__name__, *_describe(module), reason, read, typed, turned)
    return found


def _describe(module: nn.Module) -> tuple[str, bool]:
    """Return a module's kind, and whether PEFT's wrapper of that kind computes as its class does."""
    own: Any = type(module)
    for kind, cls in KINDS:
        if isinstance(module, cls):
            scaled = (
                kind == "embedding" and getattr(module, "embed_scale", None) is not None
            )  # PEFT scales its part too
            return kind, (scaled or own.forward is cls.forward) and _is_plain(module)
    if own.__name__ == "Conv1D" and own.__module__ == "transformers.pytorch_utils":
        return "conv1d", True
    return "other", False


def _is_plain(module: Any) -> bool:
    """Tell whether a module's settings are those that PEFT's factors have too."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    if isinstance(module, CONVS):
        own = type(module).__init__ is not getattr(nn, f"Conv{module.weight.ndim - 2}d").__init__
        return not own and module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return True
