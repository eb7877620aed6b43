"""A tiny configuration of any architecture: its defaults, with every known size made small by the size's name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

KEPT = re.compile(
    r"_rate$|theta|temperature|_time|stride|channels_per|num_channels|kernel|dilation|pad(ding)?$|seed|_coef|_cost|"
    r"ignore|num_labels|in_chans|audio_channels|input_channels|_scale$|^scale|scale_factor|type_vocab|beams|_ratio|"
    r"spatial_merge|temporal_patch|eps|sampling_rate|prob|levels|_mult(iplier)?$|capacity|threshold|hop_length|"
    r"chunk_size_feed_forward|chunk_(length|left|right)|expand|pretraining_tp|bias_max|_factor$|_rates$|sample_rat|sampling_rat|nemo_|n_docs|pool"
)
VOCAB = 60
SIZES = (  # pattern of a field's name, its tiny value; the first that fits decides
    (r"(kv|key_value)_?(attention_)?heads|multi_query_group_num", 1),
    (r"experts?_per_tok|moe_top_?k$|moe_topk|experts_per_token|num_selected_experts|moe_k$", 2),
    (r"^(n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|ssm_groups)$", 1),
    (r"num_groups$", 2),
    (r"shared_experts?$|first_k_dense|num_dense_layers|moe_layer_(start|freq)|sparse_step", 1),
    (r"experts$|experts_num|moe_num_experts", 4),
    (r"q_lora_rank", 12),
    (r"kv_lora_rank", 10),
    (r"lora_rank|_rank$|low_rank|lora_dim", 4),
    (r"qk_(nope|rope)_head_dim|v_head_dim", 8),
    (r"rotary_dim|rope_dim", 4),
    (r"qk_head_dim", 16),
    (r"head_dim|d_kv|head_size|dim_head|d_head|kv_channels|dim_per_head", 8),
    (r"index_topk|num_queries|num_query|num_detection_tokens|num_latents|num_proposals", 6),
    (r"(image|img|crop|input|train)_?(image_)?size$|^resolution$|^image_size", 32),
    (r"window_size$", 4),
    (r"patch_size|patch_dim", 8),
    (r"(num_|n_)?mel(_bins|s)$|num_mel", 16),
    (r"char_vocab|vocab|num_embeddings$|num_embeds", 60),
    (r"position|max_seq|max_len|n_ctx|seq_len|context_(length|window)|max_(source|target|text)|window_len|mem_len", 64),
    (r"sliding_window|attention_window|local_attention|chunk_size|block_size", 8),
    (r"heads?$|num_heads|heads_per|attention_heads", 2),
    (r"layers?$|depth$|num_blocks|n_blocks|(encoder|decoder)_blocks", 2),
    (r"intermediate|ffn|feed_?forward|mlp_dim|d_ff|n_inner|linear_units|d_inner", 24),
    (r"hidden|dim|width|channels|d_model|n_embd|embed|units|filters|size|state|features?$", 16),
)
INDICES = re.compile(
    r"ind(ex|ices|exes|ices_list)$|_idxs?$|_layers$|_blocks$|out_indices|_layer_ids$|summary|insert_layer"
)
TOKEN = re.compile(
    r"(token|bos|eos|pad|boi|eoi|boa|eoa|start|end|mask|think|nothink)_(id|index|token_id)$|_token_index$"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How sizes become small: by SIZES, times ``unit``, or, if there is a ``divisor``, widths divided by it.

    ``derived`` leaves out what a configuration works out itself; ``filled`` gives numbers to what is None by default;
    ``equal`` makes key-value heads as many as heads.
    """

    divisor: int = 0
    unit: int = 1
    derived: bool = False
    filled: bool = False
    equal: bool = False


RECIPES = (
    *(Recipe(), Recipe(derived=True), Recipe(filled=True), Recipe(equal=True), Recipe(equal=True, derived=True)),
    *(Recipe(unit=2), Recipe(16), Recipe(16, derived=True), Recipe(unit=4, derived=True), Recipe(8)),
)
FILLED = {
    **{"head_dim": 8, "num_key_value_heads": 2, "vocab_size": VOCAB, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"num_experts": 4, "prediction_length": 4, "moe_intermediate_size": 12, "kv_channels": 8, "num_local_experts": 4},
}


def shrink(config: Any, recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a tiny relative of a configuration, to be passed to its class."""
    fields, defaults = _fields(config)
    layers = {name: value for name, value in fields.items() if _is_depth(name, value)}
    small: dict[str, Any] = {}
    kinds = _layer_kinds(fields, set(layers.values()))
    depth = max([2, *(len(kept) for kept in kinds.values())])
    for name, value in fields.items():
        if recipe.derived and defaults.get(name, value) is None and not _is_config(value):
            continue
        if name in kinds:
            small[name] = (kinds[name] * depth)[:depth] if len(kinds[name]) < depth else kinds[name]
        elif name in layers and kinds:
            small[name] = depth
        else:
            small[name] = _shrink_field(name, value, recipe, max(layers.values(), default=0))
    small |= _stages(config, small)
    return {name: value for name, value in small.items() if not name.startswith("_")}


def _stages(config: Any, small: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a backbone for as many stages as its defaults do: the same ones, or of a plain stack one for each layer."""
    asked = getattr(config, "_out_indices", None)
    if not asked:
        return {}
    name = next((name for name in ("num_hidden_layers", "depth") if isinstance(small.get(name), int)), "")
    if not name or "depths" in small:
        return {"out_indices": list(asked)}
    depth = max(small[name], len(asked))
    return {name: depth, "out_indices": list(range(depth + 1 - len(asked), depth + 1))}


def _fields(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what may be passed to a configuration's class, and the declared defaults of it."""
    declared = {f.name: f.default for f in dataclasses.fields(config)}
    skipped = {"transformers_version", "architectures", "id2label", "label2id", "dtype", "problem_type", "return_dict"}
    return {name: _value(config, name, default) for name, default in declared.items() if name not in skipped}, declared


def _value(config: Any, name: str, default: Any) -> Any:
    """Return a field's value; what differs by layer has none, and takes its declared default."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None if default is dataclasses.MISSING else default


def _is_config(value: object) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict")


def _is_depth(name: str, value: object) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and bool(re.search(r"^(num_hidden_layers|n_layers?|num_layers|n_layer|depth)$", name))
    )


def _layer_kinds(fields: Mapping[str, Any], depths: set[int]) -> dict[str, list[Any]]:
    """Shorten lists with one entry for each layer, so that each kind of layer occurs, in order."""
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) in depths and len(value) > 2 and "ind" not in name
    }
    chosen: list[int] = []
    seen = set()
    for place, row in enumerate(zip(*lists.values(), strict=False)):
        if str(row) not in seen and len(chosen) < 4:
            seen.add(str(row))
            chosen.append(place)
    if lists and len(chosen) < 2:
        chosen.append(max(chosen) + 1)
    return {name: [value[place] for place in chosen] for name, value in lists.items()}


def _shrink_field(name: str, value: Any, recipe: Recipe, depth: int) -> Any:
    if _is_config(value):
        return {**shrink(value, recipe), "model_type": value.model_type}
    if value is None and recipe.filled:
        return FILLED.get(name)
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if isinstance(value, dict):
        return (
            {key: _shrink_field(key, inner, recipe, depth) for key, inner in value.items()}
            if name != "rope_parameters"
            else _shrink_rope(value)
        )
    if TOKEN.search(name):
        return _shrink_token(name, value)
    if isinstance(value, list | tuple):
        return _shrink_list(name, list(value), recipe, depth)
    return _shrink_number(name, value, recipe)


def _shrink_rope(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "mrope_section": [2, 1, 1]} if "mrope_section" in value else value


def _shrink_token(name: str, value: Any) -> Any:
    """Keep special tokens inside the small vocabulary, each another one where the name tells them apart."""
    if isinstance(value, list | tuple):
        return [_shrink_token(name, inner) for inner in value]
    if value is None or value < 10:
        return value
    return VOCAB - 1 - sum(map(ord, name)) % 40


def _shrink_number(name: str, value: int, recipe: Recipe) -> int:
    if KEPT.search(name) or value <= 2:
        return value
    for pattern, tiny in SIZES:
        if re.search(pattern, name):
            if recipe.divisor and tiny in (8, 16, 24) and "patch" not in name:
                return max(2, value // recipe.divisor) if value > recipe.divisor else value
            if recipe.divisor and "heads" in name:
                return value
            if recipe.equal and "heads" in name:
                return min(value, 2)
            return min(value, tiny * (recipe.unit if tiny in (8, 16, 24) else 1))
    return value if value < 64 else 16


def _shrink_list(name: str, value: list[Any], recipe: Recipe, depth: int) -> list[Any]:
    """Shrink a list of sizes in proportion, one of layer numbers to two layers, one of depths to ones."""
    if not value or any(isinstance(inner, str | bool | float) or inner is None for inner in value):
        return value
    if any(isinstance(inner, list | tuple) for inner in value):
        return [
            _shrink_list(name, list(inner), recipe, depth) if isinstance(inner, list | tuple) else inner
            for inner in value
        ]
    if re.search(
        r"depths|num_blocks|layers$|stage_num_blocks|layer_nums|numb_of_layers|per_stage", name
    ) and not INDICES.search(name):
        return [1] * len(value)
    if KEPT.search(name) and "channels" not in name:
        return value
    if re.search(r"heads", name):
        return [max(1, inner // min(value)) for inner in value]
    if (
        max(value) >= 16
        and re.search(r"dim|hidden|channels|size|width|embed|filters", name)
        and not re.search("patch|window|image", name)
    ):
        if recipe.divisor:
            return [inner if inner <= 3 else max(1, inner // recipe.divisor) for inner in value]
        unit = 8 * recipe.unit / min(v for v in value if v > 3) if max(value) > 3 else 1
        return [inner if inner <= 3 else max(4, 4 * round(inner * unit / 4)) for inner in value]
    if re.search(r"image_size", name):
        return [32] * len(value)
    if INDICES.search(name) and depth > 2 and max(value) > 1:
        return sorted({min(1, inner * 2 // depth) for inner in value})
    return value
