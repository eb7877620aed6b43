"""Low-rank updates of the parts of a fused matrix → one of the whole, which writes only those parts' rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaspec.architecture.peft_names import PREFIX
from deltaspec.options.methods.lora import LoraOptions
from deltaspec.training.methods.lora.peft_config import FACTOR, whole_number
from deltaspec.training.sites.attachment import Attachment
from deltaspec.training.sites.model_sites import module_at
from deltaspec.training.sites.site import Site
from deltaspec.types.methods import PeftConfig

SIDES = ("lora_A.weight", "lora_B.weight")


def join_parts(attachment: Attachment, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the LoRA tensors of each fused module's parts: ranks add up, lora_B is zero outside a part's own rows.

    Parameters
    ----------
    attachment : Attachment
        Of LoRA, some of whose sites are parts.
    released : mapping of str to Tensor
        By site.

    Returns
    -------
    dict of str to Tensor
        By module, as PEFT names them, all scaled as its first part is: where another part has a scaling of its own,
        its lora_B takes the quotient. Vectors along the outputs (biases, magnitudes) keep their neutral value outside
        of the parts: zero, or the norms of the base's rows.
    """
    joined = dict(released)
    modules: dict[str, list[Site]] = {}
    for site in attachment.sites:
        if not site.whole:
            modules.setdefault(site.path, []).append(site)
    for path, parts in modules.items():
        suffixes = [name.removeprefix(start) for name in released if name.startswith(start := _start(parts[0].name))]
        own = [{suffix: joined.pop(f"{_start(part.name)}{suffix}") for suffix in suffixes} for part in parts]
        scalings = [_options_of(attachment).scaling_at(part.name) for part in parts]
        for held, scaling in zip(own, scalings, strict=True):
            if scaling != scalings[0]:
                held |= {key: held[key] * (scaling / scalings[0]) for key in held if key.startswith("lora_B.")}
        base = module_at(attachment.model, path).weight
        assert isinstance(base, Tensor)
        base = base.detach().T if parts[0].view.transposed else base.detach()
        joined |= {f"{_start(path)}{suffix}": tensor for suffix, tensor in _join(parts, own, base).items()}
        if f"{_start(path)}bias" in joined:  # trained beside the parts, and in PEFT inside of the whole
            joined[f"{_start(path)}base_layer.bias"] = joined.pop(f"{_start(path)}bias")
    return joined


def state_ranks(config: PeftConfig, attachment: Attachment, tensors: Mapping[str, Tensor]) -> PeftConfig:
    """Return PEFT's config with the rank that each module's tensors have, and the α that keeps its scaling.

    Parameters
    ----------
    config : dict
        Of the attachment's options.
    attachment : Attachment
        Of LoRA.
    tensors : mapping of str to Tensor
        What ``join_parts`` returns.
    """
    options, first = _options_of(attachment), {site.path: site.name for site in reversed(attachment.sites)}
    found: dict[str, tuple[int, float]] = {}
    for name, tensor in tensors.items():
        if factor := FACTOR.fullmatch(name):
            own, alpha = options.patterns.get(first[factor["path"]], (options.rank, options.alpha))
            rank = tensor.shape[0]
            alpha = alpha * math.sqrt(rank / own) if options.rslora else alpha * rank / own
            found[factor["path"]] = (rank, whole_number(alpha))
    rank, alpha = Counter(found.values()).most_common(1)[0][0]
    ranks = {f"^{re.escape(path)}": own[0] for path, own in found.items() if own[0] != rank}
    alphas = {f"^{re.escape(path)}": own[1] for path, own in found.items() if own[1] != alpha}
    return config | {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}


def _options_of(attachment: Attachment) -> LoraOptions:
    assert isinstance(attachment.options, LoraOptions)
    return attachment.options


def _start(name: str) -> str:
    return f"{PREFIX}{name}."


def _join(parts: Sequence[Site], own: Sequence[Mapping[str, Tensor]], base: Tensor) -> dict[str, Tensor]:
    """Join what the parts of one module hold, by the end of its name."""
    index = torch.arange(len(base), device=base.device)
    joined = {SIDES[0]: torch.cat([held[SIDES[0]] for held in own])}
    for suffix in [suffix for suffix in own[0] if suffix != SIDES[0]]:
        given = [held[suffix] for held in own]
        if given[0].ndim == 2:
            whole = given[0].new_zeros(len(base), sum(factor.shape[1] for factor in given))
        else:
            norms = "magnitude" in suffix
            whole = base.float().norm(dim=1).to(given[0].dtype) if norms else given[0].new_zeros(len(base))
        start = 0
        for part, tensor in zip(parts, given, strict=True):
            rows = part.view.take(index)
            if tensor.ndim == 2:
                whole[rows, start : start + tensor.shape[1]] = tensor.detach()
                start += tensor.shape[1]
            else:
                whole[rows] = tensor.detach()
        joined[suffix] = whole
    return joined
