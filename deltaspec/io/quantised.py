"""Quantised weights: fp8 with its scale companions is read, every other scheme is refused by its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from deltaspec.errors import CheckpointError
from deltaspec.files.dtypes import GRIDS
from deltaspec.files.tensor_reader import read_header
from deltaspec.io.file_formats import is_pickled
from deltaspec.io.matrix import read_tensor
from deltaspec.io.quantisation_config import METADATA, Quantisation, refuse
from deltaspec.io.scales import BLOCK, fit_scale
from deltaspec.types import TensorSpec

Tensors = Mapping[str, TensorSpec]

ADDED = ("_scale_inv", "_scale")  # to a tensor's whole name; all companions multiply the stored value
BESIDE = ("scale", "scale_weight")  # instead of "weight": DeepSeek's own files, ComfyUI and musubi-tuner
MARKER, LAYER = "scaled_fp8", "comfy_quant"  # ComfyUI's, in one tensor for a file, or in one for each layer
ACTIVATIONS = re.compile(
    rf"(.*\.)?({MARKER}|{LAYER}|scale_input)|(.*[._])?(input|activation|output|prob|kv|[qkv])_scale(_inv|_ub)?"
)
MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors integer",
    ".weight_scale_2": "NVFP4",
    ".weight_zero_point": "zero points",
}
COMFY = ("float8_e4m3fn", "float8_e5m2")  # formats of ComfyUI that are stored values times weight_scale
HINT = re.compile(r"scale|absmax|amax|quant|exponent")
SAMPLES, ROWS, ENOUGH = 16, 64, 1024  # matrices, their rows, and the numbers that a matrix must hold
LARGE = 24.0  # no model's weights are that large in most of its matrices; codes that fill fp8's range are


def attach_scales(tensors: Tensors, told: Quantisation) -> dict[str, TensorSpec]:
    """Attach to each fp8 tensor its scale companion, and leave out companions, markers and activation scales.

    Parameters
    ----------
    tensors : mapping
        All tensors of a checkpoint, of all its shards: a companion may lie in another one than its tensor.
    told : Quantisation
        What files say.

    Raises
    ------
    CheckpointError
        If a tensor is quantised in a way that cannot be read, a scale fits no block of its tensor, or fp8 numbers are
        codes and their scale is not there.
    """
    for spec in tensors.values():
        if scheme := _unreadable(spec, tensors):
            raise refuse(spec.file, scheme=scheme, name=spec.name)
    coded = [spec for name, spec in tensors.items() if spec.dtype.startswith("F8_") and _leaf(name) != MARKER]
    _check_comfy(coded, tensors)
    scaled = {spec.name: _scaled(spec, scale, told) for spec in coded if (scale := _companion(spec.name, tensors))}
    used = {spec.scale.name for spec in scaled.values() if spec.scale}
    plain = [spec for spec in coded if spec.name not in {*scaled, *used} and spec.dtype != "F8_E8M0"]
    _check_plain(plain, tensors, told, used)
    return {
        name: scaled.get(name, spec)
        for name, spec in tensors.items()
        if name not in used and not (coded and ACTIVATIONS.fullmatch(name))
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _candidates(name: str) -> Iterator[str]:
    """Yield what the scale of a tensor may be called."""
    yield from (name + ending for ending in ADDED)
    module, dot, leaf = name.rpartition(".")
    if leaf == "weight":
        yield from (f"{module}{dot}{other}" for other in BESIDE)


def _companion(name: str, tensors: Tensors) -> TensorSpec | None:
    found = [tensors[other] for other in _candidates(name) if other in tensors]
    if len(found) > 1:
        message = (
            f"Cannot dequantise '{name}' in '{tensors[name].file}': both '{found[0].name}' and '{found[1].name}' may "
            "be its scale; remove one."
        )
        raise CheckpointError(message)
    return found[0] if found else None


def _unreadable(spec: TensorSpec, tensors: Tensors) -> str:
    """Return the scheme that a tensor's name and dtype give away, "" where its numbers can be read."""
    if ".quant_state." in spec.name:
        return "bitsandbytes"
    scales = f"{spec.name.removesuffix('_blocks')}_scales"
    if spec.dtype == "U8" and spec.name.endswith("_blocks") and scales in tensors:
        return "MXFP4"
    if spec.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return spec.dtype
    if spec.dtype in ("I8", "U8", "I32") and _companion(spec.name, tensors) is not None:
        return f"{spec.dtype} integers"
    return next((scheme for ending, scheme in MARKS.items() if spec.name.endswith(ending)), "")


def _check_comfy(coded: Iterable[TensorSpec], tensors: Tensors) -> None:
    """Refuse the formats of ComfyUI whose scales do not multiply as they are stored, such as tiled ones."""
    formats: dict[str, object] = {}
    for file in {spec.file for spec in coded if not is_pickled(spec.file)}:
        layers = _parse(read_header(file)[1].get("__metadata__", {}).get(METADATA, "{}")).get("layers")
        for module, layer in (layers if isinstance(layers, dict) else {}).items():
            formats[f"{module}.weight"] = layer.get("format") if isinstance(layer, dict) else layer
    for spec in coded:
        layer = tensors.get(f"{spec.name.removesuffix('weight')}{LAYER}")
        if layer is not None and layer.dtype == "U8":
            formats[spec.name] = _parse(bytes(read_tensor(layer).flatten().tolist())).get("format")
        if (formats.get(spec.name) or COMFY[0]) not in COMFY:
            raise refuse(spec.file, scheme=f"ComfyUI's {formats[spec.name]}", name=spec.name)


def _parse(text: str | bytes) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _scaled(spec: TensorSpec, scale: TensorSpec, told: Quantisation) -> TensorSpec:
    """Return an fp8 tensor with its scale and the block that each of its numbers covers."""
    block = fit_scale(spec.shape, scale.shape, told.block)
    reason = ""
    if block is None:
        verb = "correct" if told.block else "set"
        reason = f"in blocks of {told.block or BLOCK}; {verb} weight_block_size in config.json"
    elif scale.dtype == "U8" and not told.exponents and block != (1, 32):  # MX formats: 32 columns share a byte
        reason = f"in blocks of {block} that are known to be exponents; dequantise it with the tool it is from"
    elif scale.dtype not in GRIDS and scale.dtype not in ("F8_E8M0", "U8"):
        reason = "that are known to be numbers; dequantise it with the tool it is from"
    if block is None or reason:
        message = (
            f"Cannot dequantise '{spec.name}' in '{spec.file}': its shape {spec.shape} takes no scales of shape "
            f"{scale.shape} and dtype {scale.dtype} {reason}."
        )
        raise CheckpointError(message)
    return replace(spec, scale=scale, block=block)


def _check_plain(plain: list[TensorSpec], tensors: Tensors, told: Quantisation, used: set[str]) -> None:
    """Refuse fp8 tensors without a scale where anything says that they are codes, and scales without such tensors."""
    marker = next((name for name in tensors if _leaf(name) in (MARKER, LAYER)), "")
    sign = f"{told.source} says that weights are quantised" if told.source else ""
    sign = sign or (f"'{marker}' says that weights have scales" if marker else "")
    sign = sign or (f"other tensors have scales ('{min(used)}')" if used else "")
    sign = sign or (f"'{beside}' may be a scale" if plain and (beside := _find_hint(plain, tensors)) else "")
    if plain and not sign and _typical_size(plain) > LARGE:
        sign = f"numbers of a typical size of {_typical_size(plain):.0f} are codes"
    if plain and sign:
        spec = plain[0]
        message = (
            f"Cannot dequantise '{spec.name}' in '{spec.file}': it is stored as {spec.dtype} and {sign}, but it has no "
            f"scale ({', '.join(map(_leaf, _candidates(spec.name)))}); download the model again, or dequantise it with "
            "the tool it is from."
        )
        raise CheckpointError(message)
    for spec in tensors.values():
        if not spec.dtype.startswith("F8_"):
            _check_leftovers(spec, tensors)


def _check_leftovers(spec: TensorSpec, tensors: Tensors) -> None:
    """Refuse a tensor that is not quantised, or no longer, beside a scale of its own."""
    module, dot, leaf = spec.name.rpartition(".")
    names = (f"{spec.name}_scale_inv", f"{spec.name}_scale", f"{module}{dot}scale_weight")
    left = [scale for scale in names if scale in tensors]
    if left and leaf == "weight":
        message = (
            f"Cannot use '{spec.name}' in '{spec.file}': it is stored as {spec.dtype} beside its scale '{left[0]}', "
            "and whether it is multiplied already is not known; remove the scales if it is."
        )
        raise CheckpointError(message)


def _find_hint(plain: list[TensorSpec], tensors: Tensors) -> str:
    """Name a tensor that may scale one of these though its name is not known: by where it lies, or by its dtype."""
    modules = {module for spec in plain for module in (spec.name, spec.name.rpartition(".")[0])}
    beside = tuple(f"{module}_" for module in modules if module)  # q_proj_scale beside q_proj.weight
    return next(
        (
            name
            for name, spec in tensors.items()
            if spec.dtype == "F8_E8M0"
            or (
                HINT.search(_leaf(name))
                and (name.rpartition(".")[0] in modules or name.startswith(beside))
                and not ACTIVATIONS.fullmatch(name)
            )
        ),
        "",
    )


def _typical_size(specs: list[TensorSpec]) -> float:
    """Return the median over some matrices of the root mean square of their first rows; nothing else is read."""
    matrices = [spec for spec in specs if len(spec.shape) > 1 and math.prod(spec.shape) >= ENOUGH]
    chosen = matrices[:: -(-len(matrices) // SAMPLES)] if matrices else []
    sizes = sorted(float(read_tensor(spec)[:ROWS].to(torch.float64).square().nanmean().sqrt()) for spec in chosen)
    return sizes[len(sizes) // 2] if sizes else 0.0
