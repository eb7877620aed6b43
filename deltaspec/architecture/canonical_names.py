"""A tensor's name without what wrappers of a training added to it: the name that the model itself gives it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deltaspec.errors import CheckpointError

# Wrappers of torch and its trainers hold what they wrap as a private attribute: _orig_mod, _fsdp_wrapped_module,
# _checkpoint_wrapped_module, _forward_module, _fpw_module.
WRAPPER = re.compile(r"(?<![^.])_\w*mod(?:ule)?\.")
# Left by an adapter that was merged and not unloaded; before factors it counts the nesting of PEFT's parameters.
LAYER = re.compile(r"(?:\.base_layer)+(?!\.(?:base_layer|lora_))(?=\.)")
SAVED = re.compile(r"(?<![^.])(?:original_module|modules_to_save\.default)\.")  # PEFT's, in a whole model's state
LEADING = ("module.", "base_model.model.")  # DDP's, DataParallel's and DeepSpeed's; PEFT's


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Take wrappers off the names of one checkpoint or adapter.

    A leading ``module.`` or ``base_model.model.`` is a wrapper's where all names have it.

    Parameters
    ----------
    names : iterable of str
        All names that the checkpoint stores.

    Returns
    -------
    dict of str to str
        Stored name → canonical name, in the order given.

    Raises
    ------
    CheckpointError
        If two names are one without their wrappers.

    Examples
    --------
    >>> canonical_names(["module._orig_mod.layers.0._fsdp_wrapped_module.q_proj.base_layer.weight"])
    {'module._orig_mod.layers.0._fsdp_wrapped_module.q_proj.base_layer.weight': 'layers.0.q_proj.weight'}
    """
    found = {name: SAVED.sub("", LAYER.sub("", WRAPPER.sub("", name))) for name in names}
    while prefix := next((p for p in LEADING if found and all(_follows(n, p) for n in found.values())), ""):
        found = {name: bare.removeprefix(prefix) for name, bare in found.items()}
    seen: dict[str, str] = {}
    for name, bare in found.items():
        if bare in seen:
            first, second = sorted((seen[bare], name))
            message = (
                f"Cannot tell '{first}' from '{second}': without their wrappers both are '{bare}'; keep one of them."
            )
            raise CheckpointError(message)
        seen[bare] = name
    return found


def _follows(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name != prefix


def is_plain(name: str, canonical: str) -> bool:
    """Tell whether an adapter's key, without PEFT's prefix, has no wrapper; PEFT's own ``base_layer`` is none there."""
    return LAYER.sub("", name) == canonical.removeprefix(LEADING[1])
