"""Quantised weights: fp8 with its scale companions is read, every other scheme is refused by its name."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.errors import CheckpointError
from deltaspec.types import Shape, TensorSpec

READABLE = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")  # as far as the tensors are float
BLOCK = (128, 128)  # DeepSeek's, where the config names none
COMPANIONS = ("_scale_inv", "_scale")  # both multiply the stored value
ACTIVATIONS = re.compile(r"(.*[._])?(input|activation|output|prob|kv|[qkv])_scale(_inv|_ub)?")
MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors integer",
    ".weight_scale_2": "NVFP4",
}
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4"}


def refuse(source: Path, *, scheme: str, name: str = "") -> CheckpointError:
    """Return the error for a scheme that cannot be read."""
    where = f"'{name}' in '{source}'" if name else f"'{source}'"
    message = (
        f"Cannot read {where}: it is quantised with {scheme}, which deltaspec does not dequantise; "
        "dequantise the model and save it in safetensors."
    )
    return CheckpointError(message)


def check_config(config: dict[str, Any], *, source: Path) -> None:
    """Refuse a checkpoint whose config names a quantisation that cannot be read.

    Raises
    ------
    CheckpointError
        Naming the scheme.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return
    method = str(settings.get("quant_method", "")).lower()
    if not method and any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if method and method not in READABLE:
        raise refuse(source, scheme=NAMES.get(method, method))


def attach_scales(tensors: dict[str, TensorSpec], config: dict[str, Any], *, source: Path) -> dict[str, TensorSpec]:
    """Attach to each fp8 tensor its scale companion, and leave out companions and activation scales.

    Parameters
    ----------
    tensors : dict
        All tensors of a checkpoint, of all its shards: a companion may lie in another one than its tensor.
    config : dict
        ``quantization_config.weight_block_size`` gives the block, 128 × 128 where it is absent.
    source : Path
        For errors.

    Raises
    ------
    CheckpointError
        If a tensor is quantised in a way that cannot be read, or a scale fits no block of its tensor.
    """
    for spec in tensors.values():
        if scheme := _unreadable(spec, tensors):
            raise refuse(spec.file, scheme=scheme, name=spec.name)
    default = _block_size(config, source=source)
    kept: dict[str, TensorSpec] = {}
    used: set[str] = set()
    quantised = any(spec.dtype.startswith("F8_") for spec in tensors.values())
    for name, spec in tensors.items():
        scale = _companion(name, tensors)
        if scale is not None and spec.dtype.startswith("F8_"):
            used.add(scale.name)
            kept[name] = replace(spec, scale=scale, block=_fit(spec, scale, default=default))
        elif not (quantised and ACTIVATIONS.fullmatch(name)):
            kept[name] = spec
    return {name: spec for name, spec in kept.items() if name not in used}


def _companion(name: str, tensors: dict[str, TensorSpec]) -> TensorSpec | None:
    return next((tensors[name + ending] for ending in COMPANIONS if name + ending in tensors), None)


def _unreadable(spec: TensorSpec, tensors: dict[str, TensorSpec]) -> str:
    """Return the scheme that a tensor's name and dtype give away, "" where its numbers can be read."""
    if ".quant_state." in spec.name:
        return "bitsandbytes"
    if (
        spec.dtype == "U8"
        and spec.name.endswith("_blocks")
        and f"{spec.name.removesuffix('_blocks')}_scales" in tensors
    ):
        return "MXFP4"
    if spec.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return spec.dtype
    if spec.dtype in ("I8", "U8", "I32") and _companion(spec.name, tensors) is not None:
        return f"{spec.dtype} integers"
    return next((scheme for ending, scheme in MARKS.items() if spec.name.endswith(ending)), "")


def _block_size(config: dict[str, Any], *, source: Path) -> tuple[int, int]:
    settings = config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if size is None:
        return BLOCK
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        message = (
            f"Cannot use the config of '{source}': expected two whole numbers as weight_block_size, found {size!r}."
        )
        raise CheckpointError(message)
    return size[0], size[1]


def scale_grid(shape: Shape, scale: Shape) -> Shape:
    """Return a scale's shape with as many axes as its tensor: one for all, one per row or expert, or a grid.

    >>> scale_grid((4, 8), ()), scale_grid((4, 8), (4,)), scale_grid((256, 256), (2, 2))
    ((1, 1), (4, 1), (2, 2))
    """
    if math.prod(scale) == 1:
        return (1,) * len(shape)
    return scale + (1,) * (len(shape) - 1) if len(scale) == 1 else scale


def fit_block(shape: Shape, grid: Shape, default: tuple[int, int]) -> tuple[int, int] | None:
    """Return the block (rows, columns) with which a grid of scales covers a matrix; None where none does.

    >>> fit_block((256, 300), (2, 3), (128, 128)), fit_block((256, 300), (2, 5), (128, 128))
    ((128, 128), None)
    """
    sizes = []
    for length, count, size in zip(shape, grid, default, strict=True):
        fitting = length if count == 1 else size if count == -(-length // size) else 1 if count == length else 0
        if not fitting and length:
            return None
        sizes.append(max(fitting, 1))
    return sizes[0], sizes[1]


def _fit(spec: TensorSpec, scale: TensorSpec, *, default: tuple[int, int]) -> tuple[int, int]:
    """Return the block of an fp8 tensor's scales, over its last two axes."""
    grid = scale_grid(spec.shape, scale.shape)
    block = None
    if math.prod(scale.shape) == 1 and len(spec.shape) < 2:
        block = (1, 1)
    elif len(grid) == len(spec.shape) >= 2:
        leading = all(count in (1, length) for length, count in zip(spec.shape[:-2], grid[:-2], strict=True))
        block = fit_block(spec.shape[-2:], grid[-2:], default) if leading else None
    if block is None or not scale.dtype.startswith(("F", "BF")):
        message = (
            f"Cannot dequantise '{spec.name}' in '{spec.file}': its shape {spec.shape} takes no scales of shape "
            f"{scale.shape} and dtype {scale.dtype} in blocks of {default}; set weight_block_size in config.json."
        )
        raise CheckpointError(message)
    return block


def dequantise(
    values: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Multiply stored values by the scale of their block: W_ij = values_ij · scale_⌊i/rows⌋⌊j/columns⌋.

    Parameters
    ----------
    values : Tensor, (m, n), any float dtype
    scale : Tensor, (⌈d_out/block₀⌉, ⌈d_in/block₁⌉)
    block : tuple of int
        Rows and columns that share one scale; the last blocks may be partial.
    rows, columns : Tensor, (m,) and (n,), int64, optional
        Which rows and columns of the whole matrix ``values`` is; its first ones by default.

    Returns
    -------
    Tensor, (m, n), float64
        Exact: both factors have few enough digits.
    """
    rows = torch.arange(values.shape[0]) if rows is None else rows
    columns = torch.arange(values.shape[1]) if columns is None else columns
    scales = scale.to(torch.float64)[rows // block[0]][:, columns // block[1]]
    return values.to(torch.float64).mul_(scales)
