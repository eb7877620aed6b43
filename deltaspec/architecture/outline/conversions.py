"""Where transformers puts each stored tensor on loading: told by its own table of conversions, asked name by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deltaspec.types import Place

NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
ADAPTED = "lora_A.weight"  # any name that PEFT adds to a module's path


class Conversions:
    """The conversions that transformers 5 applies to a checkpoint of one model.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device.
    """

    def __init__(self, model: Any) -> None:
        from transformers import conversion_mapping, core_model_loading  # only where there is such a model

        table = conversion_mapping.get_model_conversion_mapping(model)
        self._renamings = [entry for entry in table if isinstance(entry, core_model_loading.WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, core_model_loading.WeightConverter)]
        self._of_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._rename: Callable[..., tuple[str, str | None]] = core_model_loading.rename_source_key
        self._prefix, self._state = getattr(model, "base_model_prefix", ""), model.state_dict()
        self._placed: dict[str, tuple[Place, ...]] = {}  # asking takes a second for the names of a large mixture
        kind = getattr(model.config, "model_type", None)
        known: Any = conversion_mapping
        self._in_peft = known.get_checkpoint_conversion_mapping(kind) is not None
        shared = {"mixtral": "mixtral", **getattr(known, "_MODEL_TO_CONVERSION_PATTERN", {})}
        # PEFT 0.21 turns experts' and routers' older names into parameters for models that share these two tables.
        self.takes_experts = shared.get(kind) in ("mixtral", "qwen2_moe")

    def place(self, names: Iterable[str]) -> Mapping[str, tuple[Place, ...]]:
        """Say where stored tensors go; a name that goes nowhere keeps it."""
        return {name: self._placed.get(name) or self._placed.setdefault(name, self._place(name)) for name in names}

    def renamed(self, path: str) -> str:
        """Return the path under which PEFT looks for factors of this one: it renames keys before it looks for them.

        It does so for models whose type has conversions, with these conversions (PEFT 0.21).
        """
        if not self._in_peft:
            return path
        return self._rename(f"{path}.{ADAPTED}", self._renamings, [])[0].removesuffix(f".{ADAPTED}")

    def _place(self, name: str) -> tuple[Place, ...]:
        found, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._state)
        if found not in self._state and name in self._state:  # a running name already
            found, pattern = self._rename(name, [], [], self._prefix, self._state)
        if pattern is None or found not in self._state:
            return (Place(found if found in self._state else name),)
        return self._convert(name, found, pattern)

    def _convert(self, name: str, found: str, pattern: str) -> tuple[Place, ...]:
        """Say what a converter makes of a tensor, where that is blocks of rows."""
        entry = self._of_pattern[pattern]
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in entry.operations]
        sources, targets = entry.source_patterns, entry.target_patterns
        numbers = NUMBER.findall(name)
        stacked = steps[:1] == [("MergeModulelist", 0)] and len(targets) == 1 and numbers
        if stacked and (len(steps) == 1 or steps[1:] == [("Concatenate", 1)]):
            return (Place(found, int(numbers[-1]), sources.index(pattern), len(sources)),)
        if steps == [("Chunk", 0)] and getattr(entry.operations[0], "num_shards_attribute", None) is None:
            first = targets[0]
            names = [found.replace(first, target, 1) for target in targets]
            if first in found and all(target in self._state for target in names):
                return tuple(Place(target, None, i, len(names)) for i, target in enumerate(names))
        if steps[:1] == [("Transpose", None)] and _is_checked(entry) and len(steps) == 1:
            return (Place(found),)  # turned only where the shape does not fit, which is looked at elsewhere
        return (Place(found, moved=", ".join(step for step, _ in steps)),)


def _is_checked(entry: Any) -> bool:
    return bool(getattr(entry.operations[0], "check_dims", False))
