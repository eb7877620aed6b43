"""Meta's layout of Llama, which Mistral uses too: read into Hugging Face's names, row order and whole tensors.

A file may hold one tensor-parallel rank: a part of every tensor, under the same name in each of them. The rows of q and
k are in the order of Meta's rotary embedding, which turns neighbouring rows of a head; Hugging Face's turns a row of
the first half with one of the second.

References
----------
transformers, src/transformers/models/llama/convert_llama_weights_to_hf.py and
models/mistral/convert_mistral_weights_to_hf.py: names, axes and the permutation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError
from deltaspec.files.json_file import read_json
from deltaspec.io.shards import list_tensors
from deltaspec.types import Pieces, Shape, TensorSpec

RANK = re.compile(r"consolidated\.\d+\.(pth|pt|safetensors)")
PARAMS = "params.json"
TOKENS = "tok_embeddings.weight"
QUERIES = (".attention.wq.weight", ".attention.wqkv.weight")  # the second joined by tools that keep Meta's order
LAYER = re.compile(r"layers\.(?P<depth>\d+)\.(?P<module>.+)\.weight")
EXPERT = re.compile(r"feed_forward\.experts\.(?P<expert>\d+)\.(?P<part>w[123])")
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ACROSS = ("wo", "w2")  # split among ranks along their inputs
WHOLE = ("norm", "attention_norm", "ffn_norm", "gate")  # the same in every rank
FREQUENCIES = "rope.freqs"
COMPUTED = (FREQUENCIES, "freqs_cis")  # follow from the sizes
CONVERT = "convert it with transformers' convert_llama_weights_to_hf (of Mistral, convert_mistral_weights_to_hf)"
Held = dict[str, list[TensorSpec]]
"""Tensors by name, one for each file that holds it, in the order of ranks."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of attention: query heads, key and value heads, rows of a head, width of the model."""

    queries: int
    keys: int
    rows: int
    width: int
    source: Path


def is_meta(held: Collection[str], config: Mapping[str, Any]) -> bool:
    """Tell whether tensors are named as Meta names them; a model with code of its own may use such names for others.

    >>> is_meta(["tok_embeddings.weight", "layers.0.attention.wq.weight"], {})
    True
    """
    trunk = next((name.removesuffix(TOKENS) for name in held if name.endswith(TOKENS)), None)
    if trunk is None or config.get("model_type" if trunk else "auto_map"):
        return False
    return any(name.startswith(f"{trunk}layers.") and name.endswith(QUERIES) for name in held)


def hold_ranks(files: Sequence[Path], state: str = "") -> tuple[Held, dict[str, str]]:
    """List the tensors of rank files, and the names that share another's memory in all; ``state`` as in ``gather``.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    """
    held: Held = {}
    listed = [list_tensors(file, state) for file in files]
    for tensors, _ in listed:
        for name, spec in tensors.items():
            held.setdefault(name, []).append(spec)
    first = listed[0][1]
    return held, {name: kept for name, kept in first.items() if all(shared.get(name) == kept for _, shared in listed)}


def convert(held: Held, files: Sequence[Path], config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Say how each tensor of Hugging Face's layout is put together; nothing is read yet.

    Parameters
    ----------
    held : dict
    files : sequence of Path
        Those that hold them; several hold either different tensors or ranks of the same ones.
    config : mapping
        Of config.json beside them, used where there is no params.json.

    Raises
    ------
    CheckpointError
        If the heads are not known, a rank is missing, or a tensor has no place in the layout.
    """
    heads = _read_heads(held, files, config)
    ranks = max(len(specs) for specs in held.values())
    tensors = {}
    for name, specs in held.items():
        if name in COMPUTED:
            continue
        target, module = _rename(name, specs[0])
        if len(specs) != ranks:
            message = (
                f"Cannot read '{name}' of '{specs[0].file.parent}': {len(specs)} of {ranks} rank files hold it; "
                f"download them again, or {CONVERT}."
            )
            raise CheckpointError(message)
        leaf = module.rpartition(".")[2]
        parts = tuple(specs[:1] if leaf in WHOLE else specs)
        turned = {"wq": heads.queries, "wk": heads.keys}.get(leaf, 0)
        axis = int(leaf in ACROSS or (leaf == "tok_embeddings" and parts[0].shape[-1] < heads.width))
        spec = TensorSpec(
            target, parts[0].file, _joined(parts, axis), parts[0].dtype, pieces=Pieces(parts, axis, turned)
        )
        _check(spec, leaf, heads)
        tensors[target] = spec
    return tensors


def rename_shared(shared: Mapping[str, str], tensors: Collection[TensorSpec]) -> dict[str, str]:
    """Return Hugging Face's names of tensors that share memory; what is not stored there is left out."""
    names = {spec.pieces.parts[0].name: spec for spec in tensors if spec.pieces}
    pairs = [(name, names[kept]) for name, kept in shared.items() if kept in names]
    return {_rename(name, spec)[0]: spec.name for name, spec in pairs if name not in COMPUTED}


def _rename(name: str, spec: TensorSpec) -> tuple[str, str]:
    """Return Hugging Face's name, and Meta's name of the module alone."""
    module = name.removesuffix(".weight")
    if module in TOP and name.endswith(".weight"):
        return f"{TOP[module]}.weight", module
    if match := LAYER.fullmatch(name):
        module, place = match["module"], f"model.layers.{match['depth']}"
        if module in MODULES:
            return f"{place}.{MODULES[module]}.weight", module
        if expert := EXPERT.fullmatch(module):
            return f"{place}.block_sparse_moe.experts.{expert['expert']}.{expert['part']}.weight", module
    message = (
        f"Cannot read '{name}' of '{spec.file}': the file is in Meta's layout, and this tensor has no place in "
        f"Llama's or Mixtral's; {CONVERT}."
    )
    raise CheckpointError(message)


def _joined(parts: tuple[TensorSpec, ...], axis: int) -> Shape:
    shape = list(parts[0].shape)
    fits = all(len(p.shape) == len(shape) > axis and p.dtype == parts[0].dtype for p in parts)
    if not fits or any(p.shape[:axis] + p.shape[axis + 1 :] != (*shape[:axis], *shape[axis + 1 :]) for p in parts):
        found = ", ".join(f"{p.dtype} {p.shape}" for p in parts)
        message = (
            f"Cannot join '{parts[0].name}' of '{parts[0].file.parent}' from its rank files: they hold {found}; "
            "download them again."
        )
        raise CheckpointError(message)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return tuple(shape)


def _check(spec: TensorSpec, leaf: str, heads: Heads) -> None:
    """Refuse a shape that the sizes contradict: a rank file is missing, or the sizes are another model's."""
    inner = heads.queries * heads.rows
    wanted: dict[str, tuple[int | None, ...]] = {
        "wq": (inner, heads.width),
        "wk": (heads.keys * heads.rows, heads.width),
        "wv": (heads.keys * heads.rows, heads.width),
        "wo": (heads.width, inner),
        "w1": (None, heads.width),
        "w2": (heads.width, None),
        "w3": (None, heads.width),
        "tok_embeddings": (None, heads.width),
        "output": (None, heads.width),
    }
    shape = wanted.get(leaf, spec.shape)
    if len(shape) != len(spec.shape) or any(size not in (None, n) for size, n in zip(shape, spec.shape, strict=True)):
        message = (
            f"Cannot read '{spec.name}' in '{spec.file}' from Meta's layout: '{heads.source.name}' asks for shape "
            f"{_say(shape)}, the rank files read here hold {spec.shape}; open the folder with all consolidated files "
            f"of the model and its {PARAMS}, or {CONVERT}."
        )
        raise CheckpointError(message)


def _say(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def _read_heads(held: Held, files: Sequence[Path], config: Mapping[str, Any]) -> Heads:
    """Take the sizes from params.json beside the files, from config.json, or from the stored rotary frequencies."""
    folder = files[0].parent
    params = _inner(read_json(folder / PARAMS) if (folder / PARAMS).is_file() else {}, "model")
    settings = _inner(config, "text_config")
    queries, keys, rows, width = (
        next((n for n in (params.get(own), settings.get(other)) if type(n) is int and n > 0), 0)
        for own, other in (
            ("n_heads", "num_attention_heads"),
            ("n_kv_heads", "num_key_value_heads"),
            ("head_dim", "head_dim"),
            ("dim", "hidden_size"),
        )
    )
    source = folder / (PARAMS if params else "config.json")
    norm = next((specs[0].shape for name, specs in held.items() if name == "norm.weight"), ())
    width = width or (norm[0] if norm else 0)
    freqs = held[FREQUENCIES][0] if FREQUENCIES in held else None
    if not queries and freqs and len(freqs.shape) == 1 and width and 0 not in freqs.shape:
        rows, source = 2 * freqs.shape[0], freqs.file  # Llama 1 and 2 alone store them, where heads make up the width
        queries = width // rows
        stored = next((specs for name, specs in held.items() if name.endswith("attention.wk.weight")), [])
        keys = sum(spec.shape[0] for spec in stored) // rows
    if not queries or not width or (rows or width // queries) % 2:
        message = (
            f"Cannot read '{files[0]}': it is in Meta's layout, where the rows of q and k are ordered by heads, and "
            f"neither {PARAMS} nor config.json beside it says how many there are; put the model's {PARAMS} there, or "
            f"{CONVERT}."
        )
        raise CheckpointError(message)
    return Heads(queries, keys or queries, rows or width // queries, width, source)


def _inner(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = settings.get(key)
    return inner if isinstance(inner, dict) else settings


def refuse_rank(file: Path) -> CheckpointError:
    """Return the error for a file that is named as a rank of Meta's, with tensors that are not."""
    message = (
        f"Cannot read '{file}': it is named as a tensor-parallel rank in Meta's layout, which may hold a part of every "
        "tensor, and its tensors have other names, so that it cannot be told whether it is whole; convert the model "
        "to a Hugging Face folder, or rename the file if it is whole."
    )
    return CheckpointError(message)
