"""Whether an adapter is plain LoRA: what its config says against it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REFUSED = {
    "use_dora": "DoRA, whose magnitudes make the change full-rank",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "kasa_config": "KaSA",
    "arrow_config": "an Arrow router over other adapters",
    "monteclora_config": "MonteCLoRA",
}
ALORA = "an aLoRA, whose factors act only after its invocation tokens"
FOLDED_SINCE = (0, 19, 1)  # PEFT folded the factors of target_parameters otherwise before
ACTIVATIONS = {  # types whose adapters change no weights
    *("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
    *(f"DELTASPEC_{method}" for method in ("SERIES", "PARALLEL", "COMPACTER", "PREFIX", "PROMPT")),
}
MOVED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")  # these subtract the initial factors from the base


def say_why_foreign(config: dict[str, Any], path: Path) -> str:
    """Say by its name that an adapter is not plain LoRA; "" where its config says that it is."""
    kind, initial = config.get("peft_type"), config.get("init_lora_weights")
    if isinstance(initial, str) and MOVED_BASE.match(initial.lower()):
        return say_foreign(path, f"a LoRA adapter that started from {initial} and so belongs to a changed base")
    if option := next((text for key, text in REFUSED.items() if config.get(key)), ""):
        return say_foreign(path, f"a LoRA adapter with {option}")
    if not isinstance(kind, str):
        return say_foreign(path, "an adapter of unknown type")
    if kind != "LORA":
        return say_foreign(path, f"a {kind} adapter", changes_weights=kind not in ACTIVATIONS)
    if config.get("target_parameters") and _version(config) < FOLDED_SINCE:
        version = config.get("peft_version") or "unknown"
        folded = f"a LoRA adapter with target_parameters of PEFT {version}, folded otherwise than since 0.19.1"
        return say_foreign(path, folded)
    return ""


def say_foreign(path: Path, what: str, *, changes_weights: bool = True) -> str:
    """Return the sentence for an adapter that is not plain LoRA, and say what can be done with it."""
    if not changes_weights:
        return f"Cannot read '{path}' as LoRA: it is {what}, which changes no weights."
    return (
        f"Cannot read '{path}' as LoRA: it is {what}; deltaspec analyze reads those of deltaspec's own methods as they "
        "are, all else takes the model with it merged in (deltaspec train --save full, or PEFT's merge_and_unload)."
    )


def _version(config: dict[str, Any]) -> tuple[int, ...]:
    """Return the numbers that peft_version starts with; none where it says nothing."""
    found = re.match(r"[0-9]{1,9}(\.[0-9]{1,9})*", str(config.get("peft_version")))
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def name_condition(config: dict[str, Any]) -> str:
    """Say what restricts the change to some tokens; "" where there is no such thing."""
    return "" if config.get("alora_invocation_tokens") is None else ALORA
