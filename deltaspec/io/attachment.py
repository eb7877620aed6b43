"""Whether what an adapter holds will act where it says, once it is loaded."""

from __future__ import annotations

import re

from deltaspec.architecture.peft_names import is_loaded, is_parameter
from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterIndex

STORED = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_.*")
LEFT_OUT = "adapter_config.json leaves it out of what PEFT loads"


def find_unattached(adapter: AdapterIndex, layout: Layout) -> dict[str, str]:
    """Find the factors and whole tensors that would change nothing, or something else than they say.

    Parameters
    ----------
    adapter : AdapterIndex
    layout : Layout
        Of its base.

    Returns
    -------
    dict
        Path or name → why, half a sentence; empty too where the running model is not known.
    """
    config = adapter.config
    reasons = {path: layout.unattached(path, as_parameter=is_parameter(path, config)) for path in adapter.modules}
    if isinstance(config.get("target_modules"), str | list):
        kept = {path for path in adapter.modules if is_loaded(_stored_path(path, adapter), config)}
        reasons |= {path: LEFT_OUT for path in adapter.modules if not reasons[path] and path not in kept}
    beside = {f"{path}.weight" for path in adapter.modules}
    reasons |= {
        name: f"{layout.checked} has no such parameter" for name in adapter.full.keys() - beside if layout.lacks(name)
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _stored_path(path: str, adapter: AdapterIndex) -> str:
    """Return a module's path as the adapter's file and config have it, whatever --map made of it."""
    found = STORED.fullmatch(adapter.modules[path].lora_A.stored_name)
    return path if found is None or is_parameter(path, adapter.config) else found[1]
