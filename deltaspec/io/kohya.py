"""LoRA files of kohya's naming: lora_unet_…, lora_te_… with lora_down, lora_up and alpha, in one file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from deltaspec.errors import CheckpointError
from deltaspec.io.matrix import read_tensor
from deltaspec.types import AdapterIndex, LowRankTerm, TensorSpec

KEY = re.compile(r"(?P<module>lora_[a-z0-9]+_[^.]+)\.(?P<kind>.+)")
FACTORS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "alpha": "alpha"}


def is_kohya(names: Iterable[str]) -> bool:
    """Tell whether tensors of these names are a LoRA of this naming."""
    return any(match["kind"] in FACTORS for name in names if (match := KEY.fullmatch(name)))


def index_adapter(file: Path, tensors: dict[str, TensorSpec], *, ref: str) -> AdapterIndex:
    """Sort the tensors of one file into factors; of values only the alphas are read.

    Parameters
    ----------
    file : Path
    tensors : dict
        By name, all that the file holds.
    ref : str
        What the user asked for.

    Returns
    -------
    AdapterIndex
        Modules by their flattened names (``lora_unet_mid_block_…_to_q``), which pairing resolves against a base;
        scaling is alpha / rank, 1 where there is no alpha.

    Raises
    ------
    CheckpointError
        If it holds anything but LoRA factors, or they do not fit each other.
    """
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in tensors.items():
        match = KEY.fullmatch(name)
        kind = match["kind"] if match else name
        if match is None or kind not in FACTORS:
            what = "it is no LoRA factor; merge it into its base with the tool it is from"
            message = f"Cannot use '{name}' in '{file}': {what}."
            raise CheckpointError(message)
        found.setdefault(match["module"], {})[FACTORS[kind]] = spec
    modules = {module: _pair(module, factors, file) for module, factors in sorted(found.items())}
    return AdapterIndex(ref, file.parent, (file,), modules, {}, {})


def _pair(module: str, found: dict[str, TensorSpec], file: Path) -> LowRankTerm:
    """Join a module's factors after checking that they fit each other."""
    lora_A, lora_B = found.get("lora_A"), found.get("lora_B")
    if lora_A is None or lora_B is None:
        message = (
            f"Cannot use the factors of '{module}' in '{file}': expected lora_down and lora_up, found "
            f"{', '.join(sorted(found))}; save the adapter again."
        )
        raise CheckpointError(message)
    rank = lora_A.shape[0] if lora_A.shape else 0
    fits = len(lora_A.shape) >= 2 and len(lora_B.shape) >= 2 and lora_B.shape[1] == rank > 0
    if not fits or math.prod(lora_B.shape[2:]) != 1:
        message = (
            f"Cannot multiply the factors of '{module}' in '{file}': expected lora_down (r, d_in) and lora_up "
            f"(d_out, r), found {lora_A.shape} and {lora_B.shape}; save the adapter again."
        )
        raise CheckpointError(message)
    return LowRankTerm(lora_A, lora_B, _alpha(found.get("alpha"), rank) / rank)


def _alpha(spec: TensorSpec | None, rank: int) -> float:
    if spec is None:
        return float(rank)
    values = read_tensor(spec).double().flatten() if math.prod(spec.shape) == 1 else None
    value = math.nan if values is None else float(values[0])
    if not (math.isfinite(value) and value > 0):
        message = f"Cannot use '{spec.name}' in '{spec.file}': expected one positive number, found {value}."
        raise CheckpointError(message)
    return value
