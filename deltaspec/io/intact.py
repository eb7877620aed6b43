"""Tensors that were saved as less than they are: empty under DeepSpeed ZeRO-3, or parameters as integers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from deltaspec.errors import CheckpointError
from deltaspec.files.dtypes import GRIDS
from deltaspec.types import AdapterIndex, Checkpoint, Opened, TensorSpec

FACTOR = re.compile(r"lora_(embedding_)?[AB]\b|lora_(up|down)\b")
GATHER = (
    "DeepSpeed ZeRO-3 saves so what it has not gathered: save it again with stage3_gather_16bit_weights_on_model_save, "
    "or rebuild it with zero_to_fp32.py"
)


def refuse_empty(tensors: Iterable[TensorSpec]) -> None:
    """Stop where a tensor of an adapter has no elements.

    What was not gathered has no rows. A parameter of which another axis is 0 is what some models have: no padding, say.

    Raises
    ------
    CheckpointError
        Naming tensor, file, and what was found.
    """
    for spec in tensors:
        if 0 in spec.shape and (spec.shape[0] == 0 or FACTOR.search(spec.name)):
            what = f"it is stored empty, with shape {spec.shape}"
            message = f"Cannot use '{spec.stored_name}' in '{spec.file}': {what}; {GATHER}."
            raise CheckpointError(message)


def refuse_integers(tensors: Iterable[TensorSpec]) -> None:
    """Stop where a parameter of an adapter is stored as integers.

    Raises
    ------
    CheckpointError
        Naming tensor, file, and what was found.
    """
    for spec in tensors:
        if spec.dtype not in GRIDS and (FACTOR.search(spec.name) or _is_parameter(spec)):
            message = (
                f"Cannot use '{spec.stored_name}' in '{spec.file}': expected a floating-point parameter, found dtype "
                f"{spec.dtype} and shape {spec.shape}; save the adapter again from the model as it was trained, not "
                "quantised."
            )
            raise CheckpointError(message)


def refuse_partial(base: Opened, tuned: Opened) -> None:
    """Stop where one side stores a tensor empty, or a matrix as integers, that has elements or floats on the other.

    Raises
    ------
    CheckpointError
        Naming tensor and file, and what both sides hold.
    """
    if isinstance(base, AdapterIndex):
        return
    ours = base.tensors
    theirs = tuned.tensors if isinstance(tuned, Checkpoint) else tuned.full
    for name in sorted(ours.keys() & theirs.keys()):
        _compare(ours[name], theirs[name], ("base", "tuned model"))
        if isinstance(tuned, AdapterIndex) or (name.endswith(".weight") and len(ours[name].shape) > 1):
            _compare_kinds(ours[name], theirs[name])
    for mine, other, sides in ((ours, theirs, ("base", "tuned model")), (theirs, ours, ("tuned model", "base"))):
        for name, spec in other.items():
            if 0 in spec.shape and name not in mine and (twin := _twin(name, mine)) and 0 not in twin.shape:
                raise _empty(spec, twin, sides)


def _is_parameter(spec: TensorSpec) -> bool:
    """Tell whether a tensor is trained, by its name; GPT-2's attn.bias is a mask, stored as floats or as integers."""
    return spec.name.endswith(".weight") or (spec.name.endswith(".bias") and len(spec.shape) < 2)


def _compare(base: TensorSpec, tuned: TensorSpec, sides: tuple[str, str]) -> None:
    if (0 in base.shape) != (0 in tuned.shape):
        raise _empty(base, tuned, sides[::-1]) if 0 in base.shape else _empty(tuned, base, sides)


def _compare_kinds(base: TensorSpec, tuned: TensorSpec) -> None:
    kinds = (base.dtype in GRIDS, tuned.dtype in GRIDS)
    if kinds[0] != kinds[1]:
        odd, other = (tuned, base) if kinds[0] else (base, tuned)
        message = (
            f"Cannot use '{odd.stored_name}' in '{odd.file}': its dtype is {odd.dtype} and its shape {odd.shape}, the "
            f"other side has {other.dtype} and {other.shape}; dequantise the model and save it in safetensors."
        )
        raise CheckpointError(message)


def _empty(spec: TensorSpec, twin: TensorSpec, sides: tuple[str, str]) -> CheckpointError:
    """Return the error for an empty tensor; ``sides`` are the whole one's name and the empty one's."""
    message = (
        f"Cannot use '{spec.stored_name}' in '{spec.file}': the {sides[1]} stores it empty, with shape {spec.shape}, "
        f"where the {sides[0]} has {twin.shape}; {GATHER}."
    )
    return CheckpointError(message)


def _twin(name: str, tensors: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the tensor that has this name but for a prefix that one of the two names has."""
    found = (spec for other, spec in tensors.items() if other.endswith("." + name) or name.endswith("." + other))
    return next(found, None)
