"""Whether what an adapter holds will act where it says, once it is loaded."""

from __future__ import annotations

from deltaspec.architecture.peft_names import is_parameter
from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterIndex


def list_unattached(adapter: AdapterIndex, layout: Layout) -> list[str]:
    """List the factors and whole tensors that would change nothing, or something else than they say.

    Parameters
    ----------
    adapter : AdapterIndex
    layout : Layout
        Of its base.

    Returns
    -------
    list of str
        Half a sentence each; empty too where the running model is not known.
    """
    found = []
    for path in adapter.modules:
        if reason := layout.unattached(path, as_parameter=is_parameter(path, adapter.config)):
            found.append(f"'{path}' ({reason})")
    whole = [name for name in adapter.full if name.removesuffix(".weight") not in adapter.modules]
    return found + [f"'{name}' ({layout.checked} has no such parameter)" for name in whole if layout.lacks(name)]
