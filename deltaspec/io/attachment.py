"""Whether what an adapter holds will act where it says, once it is loaded."""

from __future__ import annotations

from deltaspec.architecture.peft_names import is_parameter
from deltaspec.io.peft_layout import Layout
from deltaspec.types import AdapterIndex


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
    beside = {f"{path}.weight" for path in adapter.modules}
    reasons |= {
        name: f"{layout.checked} has no such parameter" for name in adapter.full.keys() - beside if layout.lacks(name)
    }
    return {name: reason for name, reason in reasons.items() if reason}
