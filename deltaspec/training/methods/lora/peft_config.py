"""LoRA's options ⇄ the fields of PEFT's LoraConfig."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from deltaspec.architecture.peft_names import PREFIX, find_pattern
from deltaspec.errors import CheckpointError
from deltaspec.options.methods.lora import LoraOptions
from deltaspec.types.methods import PeftConfig

FACTOR = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(A\.weight|embedding_A)")
MOVED = re.compile(r"pissa_niter|olora|corda|loftq|lora_ga")
FOREIGN = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


def to_peft(options: LoraOptions) -> PeftConfig:
    """Return the fields of PEFT's LoraConfig; of PiSSA twice the rank at the same scaling, for the base as it is.

    Parameters
    ----------
    options : LoraOptions

    Notes
    -----
    PEFT's own PiSSA files hold A and B of rank r and fit only a base from which the start was subtracted. Ours hold
    [A; A₀] and [B, -B₀]: B·A - B₀·A₀ is the change of the base as it is, so that they are plain LoRA.
    """
    twice = 2 if options.init == "pissa" else 1
    grown = math.sqrt(twice) if options.rslora else twice
    return {
        "r": options.rank * twice,
        "lora_alpha": whole_number(options.alpha * grown),
        "use_rslora": options.rslora,
        "use_dora": options.dora,
        "lora_dropout": options.dropout,
        "bias": options.bias,
        "lora_bias": options.lora_bias,
        "init_lora_weights": True,
        "rank_pattern": {f"^{re.escape(name)}": rank * twice for name, (rank, _) in options.patterns.items()},
        "alpha_pattern": {f"^{re.escape(name)}": whole_number(a * grown) for name, (_, a) in options.patterns.items()},
    }


def from_peft(config: PeftConfig, shapes: Mapping[str, tuple[int, ...]]) -> LoraOptions:
    """Read PEFT's LoraConfig; ranks of single modules come from their factors' shapes.

    Parameters
    ----------
    config : dict
        Content of ``adapter_config.json``.
    shapes : mapping of str to tuple of int
        Of the stored tensors, by name.

    Raises
    ------
    CheckpointError
        If it is a relative of LoRA's that is not trained here, or belongs to a base that PEFT changed.
    OptionError
        If its numbers make no sense.
    """
    initial = str(config.get("init_lora_weights")).lower()
    foreign = [name for name in FOREIGN if config.get(name)]
    if MOVED.match(initial):
        foreign.append(f"init_lora_weights '{initial}', which belongs to a changed base")
    if foreign:
        message = f"The adapter has {foreign[0]}, which cannot be attached: merge it, or convert it to LoRA, with PEFT."
        raise CheckpointError(message)
    rank, alpha = config["r"], config["lora_alpha"]
    patterns = {}
    for name, shape in shapes.items():
        if found := FACTOR.fullmatch(name):
            path = found["path"]
            own = (shape[0], _match(config.get("alpha_pattern") or {}, path, alpha))
            if own != (rank, alpha):
                patterns[path] = own
    return LoraOptions(
        rank=rank,
        alpha=alpha,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        init="pissa" if initial == "pissa" else "kaiming",
        dropout=config.get("lora_dropout") or 0.0,
        bias=config.get("bias") or "none",
        lora_bias=bool(config.get("lora_bias")),
        patterns=patterns,
    )


def _match(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    try:
        return find_pattern(patterns, path, otherwise)
    except re.error as cause:
        message = f"The adapter's alpha_pattern holds what is no regular expression ({cause}): download it again."
        raise CheckpointError(message) from cause


def whole_number(number: float) -> float:
    """Return an int where it is one, as PEFT writes them.

    Examples
    --------
    >>> whole_number(16.0), whole_number(0.5)
    (16, 0.5)
    """
    return int(number) if number == int(number) else number
