"""What files say about a checkpoint's quantisation: config.json, and the files that tools write beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError
from deltaspec.files.json_file import read_json

READABLE = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")  # as far as the tensors are float
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4"}
KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' of old
MODELOPT = "hf_quant_config.json"
FILES = (MODELOPT, "quantize_config.json", "quant_config.json")  # of ModelOpt, AutoGPTQ and AutoAWQ
METADATA = "_quantization_metadata"  # ComfyUI's, in a safetensors header


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What is said: by which file ("" where none says anything), and the block that shares a scale, where it is named.

    ``exponents`` tells that scales are powers of two, which some tools store as bytes.
    """

    source: str = ""
    block: tuple[int, int] | None = None
    exponents: bool = False


def refuse(source: Path, *, scheme: str, name: str = "") -> CheckpointError:
    """Return the error for a scheme that cannot be read."""
    where = f"'{name}' in '{source}'" if name else f"'{source}'"
    message = (
        f"Cannot read {where}: it is quantised with {scheme}, which deltaspec does not dequantise; "
        "dequantise the model and save it in safetensors."
    )
    return CheckpointError(message)


def read_quantisation(config: dict[str, Any], folder: Path, *, source: Path) -> Quantisation:
    """Read what config.json, and ModelOpt's file beside it, say.

    Parameters
    ----------
    config : dict
        The content of config.json.
    folder : Path
        Where ``hf_quant_config.json`` may lie.
    source : Path
        For errors.

    Raises
    ------
    CheckpointError
        If a quantisation is named that cannot be read, or its block makes no sense.
    """
    found = Quantisation()
    for settings in _list_settings(config):
        _check_method(settings, source)
        block = _block_size(settings, source) or found.block
        exponents = found.exponents or "ue8m0" in str(settings.get("scale_fmt")).lower()
        found = Quantisation("config.json", block, exponents or "mxfp8" in json.dumps(settings, default=str).lower())
    if not found.source and (folder / MODELOPT).is_file():
        stated = read_json(folder / MODELOPT).get("quantization")
        method = str(stated.get("quant_algo") or "") if isinstance(stated, dict) else ""
        found = Quantisation(MODELOPT, exponents="MXFP8" in method) if method else found
    return found


def _list_settings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of a model, or of the model inside it that has them."""
    for scope in _scopes(config):
        yield from (found for key in KEYS if isinstance(found := scope.get(key), dict) and found)


def _scopes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """List a config and those of the models inside it, however deep."""
    inner = [value for key, value in config.items() if isinstance(value, dict) and key not in KEYS]
    return [config, *(scope for value in inner for scope in _scopes(value))]


def _check_method(settings: dict[str, Any], source: Path) -> None:
    method = str(settings.get("quant_method", "")).lower()
    if not method and any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if method and method not in READABLE:
        raise refuse(source, scheme=NAMES.get(method, method))


def _block_size(settings: dict[str, Any], source: Path) -> tuple[int, int] | None:
    size = settings.get("weight_block_size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        message = (
            f"Cannot use the config of '{source}': expected two whole numbers as weight_block_size, found {size!r}."
        )
        raise CheckpointError(message)
    return size[0], size[1]


def drop_quantisation(config: dict[str, Any]) -> None:
    """Take out of a config, in place, what it says about the quantisation of numbers that are no longer quantised."""
    for scope in _scopes(config):
        for key in KEYS:
            scope.pop(key, None)
