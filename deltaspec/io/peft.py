"""PEFT's LoRA folders: which factors belong to which module, and their scaling; nothing is read yet."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaspec.architecture.canonical_names import canonical_names, is_plain
from deltaspec.architecture.peft_names import NESTED, PREFIX, find_pattern, own_parameters
from deltaspec.errors import CheckpointError
from deltaspec.files import json_file
from deltaspec.io.foreign_marks import find_factor
from deltaspec.io.intact import refuse_empty, refuse_integers
from deltaspec.io.peft_files import CONFIG, WEIGHTS, choose_adapter, gather_adapter, list_files
from deltaspec.io.plain_lora import name_condition, say_foreign, say_why_foreign
from deltaspec.types import AdapterIndex, ForeignAdapter, LowRankTerm, TensorSpec

FACTOR = re.compile(
    r"(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(\.(?P<adapter>(?!weight$|bias$)[^.]+))?(\.(?P<kind>weight|bias))?"
)
WHOLE = r"\.modules_to_save(\.{adapter})?(?=\.)|\.base_layer(?=\.)"
DEFAULT = "default"  # the adapter's name where nothing gives it one; PEFT leaves names out, other tools keep them
INNER = re.compile(r"(\.base_layer)+$")


def open_adapter(folder: Path, *, ref: str, file: Path | None = None) -> AdapterIndex | ForeignAdapter:
    """Open a folder that PEFT saved: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

    Parameters
    ----------
    folder : Path
    ref : str
        What the user asked for.
    file : Path, optional
        Where the weights are called otherwise.

    Returns
    -------
    AdapterIndex or ForeignAdapter
        Of plain LoRA each module's factors with scaling α/r, or α/√r under rsLoRA, after the rank and alpha patterns.

    Raises
    ------
    CheckpointError
        If the numbers of a LoRA adapter make no sense, or factors are missing or do not fit each other.
    """
    path = folder / CONFIG
    config = json_file.read_json(path)
    name = "" if file else choose_adapter([entry.name for entry in folder.iterdir()])
    file = folder / name if name else file
    if sentence := say_why_foreign(config, path):
        return ForeignAdapter(ref, folder, () if file is None else list_files(file), config, sentence)
    if file is None:
        message = f"Cannot open '{folder}': it has '{CONFIG}' and none of {', '.join(WEIGHTS)}; download them."
        raise CheckpointError(message)
    files, (tensors, _) = gather_adapter(file)
    if kind := find_factor(tensors)[1]:
        return ForeignAdapter(ref, folder, files, config, say_foreign(file, f"a LoRA adapter with {kind}"))
    return replace(_index(ref, file, config, tensors), files=files)


def _index(ref: str, file: Path, config: dict[str, Any], tensors: dict[str, TensorSpec]) -> AdapterIndex:
    """Sort the tensors of plain LoRA, and pair its factors."""
    path = file.with_name(CONFIG)
    refuse_empty(tensors.values())
    refuse_integers(tensors.values())
    names = canonical_names(tensors)
    factors, full, biases = _sort({names[key].removeprefix(PREFIX): spec for key, spec in tensors.items()}, file)
    if not factors and not full:
        message = f"Cannot use '{file}': it holds no LoRA factors; check that the adapter was trained and saved."
        raise CheckpointError(message)
    modules = {
        name: _pair(found, module=name, config=config, path=path)
        for name, found in sorted(_name_parameters(factors, config, path=path).items())
    }
    if alone := sorted(biases.keys() - modules.keys()):
        message = (
            f"Cannot use '{biases[alone[0]].name}' in '{file}': expected lora_A and lora_B beside it, found "
            "none; save the adapter again."
        )
        raise CheckpointError(message)
    base = config.get("base_model_name_or_path")
    named = base if isinstance(base, str) else ""
    wrapped = tuple(key for key, bare in names.items() if not is_plain(key.removeprefix(PREFIX), bare))
    found = AdapterIndex(ref, file.parent, (file,), modules, full, biases, named, config)
    return replace(found, wrapped=wrapped, conditional=name_condition(config))


def _name_parameters(
    factors: dict[str, dict[str, TensorSpec]], config: dict[str, Any], *, path: Path
) -> dict[str, dict[str, TensorSpec]]:
    """Give factors of target_parameters their parameter's full name; those of modules keep their module's path."""
    listed = config.get("target_parameters") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        message = f"Cannot use '{path}': its target_parameters are no list of names; save the adapter again."
        raise CheckpointError(message)
    nests: dict[str, dict[int, str]] = {}
    for key in factors:
        module = INNER.sub("", key)
        nests.setdefault(module, {})[key.count(".base_layer", len(module))] = key
    named = {}
    for module, nest in nests.items():
        leaves = own_parameters(module, listed)
        known = leaves == set(NESTED) or len(leaves) < 2
        if not known or sorted(nest) != list(range(max(len(leaves), 1))):
            message = (
                f"Cannot use the factors of '{module}' in '{path}': its {len(nest)} pairs and the target_parameters "
                f"{', '.join(sorted(leaves)) or '(none)'} have no known order; merge it with PEFT."
            )
            raise CheckpointError(message)
        order = [leaf for leaf in reversed(NESTED) if leaf in leaves] if len(leaves) > 1 else list(leaves)
        for depth, key in nest.items():
            named[f"{module}.{order[depth]}" if order else key] = factors[key]
    return named


def _name_of(tensors: dict[str, TensorSpec], file: Path) -> str:
    """Return the one name of an adapter that the keys of its factors carry; DEFAULT where they carry none."""
    found = {match["adapter"] or DEFAULT for key in tensors if (match := FACTOR.fullmatch(key))}
    if len(found) > 1:
        message = f"Cannot use '{file}': it holds several adapters ({', '.join(sorted(found))}); save one alone."
        raise CheckpointError(message)
    return next(iter(found), DEFAULT)


def _sort(
    tensors: dict[str, TensorSpec], file: Path
) -> tuple[dict[str, dict[str, TensorSpec]], dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Sort tensors by canonical name: factors by module ("A", "B", "embedding_A", …), whole tensors, and biases."""
    factors: dict[str, dict[str, TensorSpec]] = {}
    full: dict[str, TensorSpec] = {}
    biases: dict[str, TensorSpec] = {}
    whole = re.compile(WHOLE.format(adapter=re.escape(_name_of(tensors, file))))
    for name, spec in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            if "lora_" in name or "trainable_tokens" in name:
                message = (
                    f"Cannot use '{spec.name}' in '{spec.file}': it is no LoRA factor of a known kind; merge the "
                    "adapter."
                )
                raise CheckpointError(message)
            full[whole.sub("", name)] = spec
        elif match["kind"] == "bias":
            biases[match["module"]] = spec
        else:
            factors.setdefault(match["module"], {})[(match["embedding"] or "") + match["side"]] = spec
    return factors, full, biases


def _pair(found: dict[str, TensorSpec], *, module: str, config: dict[str, Any], path: Path) -> LowRankTerm:
    """Join a module's factors, after checking that they fit each other and the config."""
    embedding = "embedding_A" in found or "embedding_B" in found
    sides = [found.get(f"embedding_{side}" if embedding else side) for side in "AB"]
    file = next(iter(found.values())).file
    lora_A, lora_B = sides
    if lora_A is None or lora_B is None or len(found) != 2:
        message = (
            f"Cannot use the factors of '{module}' in '{file}': expected one lora_A and one lora_B, found "
            f"{', '.join(f'lora_{side}' for side in sorted(found))}; save the adapter again."
        )
        raise CheckpointError(message)
    rank = lora_A.shape[0] if lora_A.shape else 0
    fits = len(lora_A.shape) >= 2 and len(lora_B.shape) >= 2 and lora_B.shape[1] == rank > 0
    if not fits or math.prod(lora_B.shape[2:]) != 1:
        message = (
            f"Cannot multiply the factors of '{module}' in '{file}': expected lora_A (r, d_in) and lora_B (d_out, r), "
            f"found {lora_A.shape} and {lora_B.shape}; save the adapter again."
        )
        raise CheckpointError(message)
    stated = _number(config, "r", module=module, path=path)
    experts = rank // int(stated) if config.get("target_parameters") and not rank % stated else 1
    if stated * experts != rank:
        message = (
            f"Cannot scale '{module}': '{path}' gives it rank {stated:g}, its lora_A in '{file}' has {rank}; "
            "use the config that was saved with these weights."
        )
        raise CheckpointError(message)
    alpha = _number(config, "lora_alpha", module=module, path=path)
    scaling = alpha / (math.sqrt(stated) if config.get("use_rslora") else stated)
    return LowRankTerm(lora_A, lora_B, scaling, embedding=embedding, experts=experts if experts > 1 else 0)


def _number(config: dict[str, Any], option: str, *, module: str, path: Path) -> float:
    """Return r or lora_alpha of one module, by the first pattern that its path ends in, else the global value."""
    key = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[option]
    patterns = config.get(key) or {}
    value = config.get(option)
    try:
        value = find_pattern(patterns, module, value)
    except (re.error, AttributeError, RecursionError) as cause:
        message = f"Cannot use '{path}': its {key} is no map from regular expressions to numbers ({cause})."
        raise CheckpointError(message) from cause
    positive = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not positive or value is None:
        message = f"Cannot use '{path}': expected a positive number as {option} of '{module}', found {value!r}."
        raise CheckpointError(message)
    return float(value)
