"""A checkpoint's tensors under the names that its running model gives them: those PEFT addresses.

The library that makes the model tells them. Where there is none that knows it, a table of ours for the models that
people tune most is the fallback.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from deltaspec.architecture.outline.find import find_outline
from deltaspec.types import Config, Outline, Place, Shape

Rules = tuple[tuple[str, str], ...]


LEGACY: Rules = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
TOWERS: Rules = (
    (r"^language_model\.lm_head(?=\.)", "lm_head"),
    (r"^language_model\.model(?=\.)", "model.language_model"),
    (r"^(?=(language_model|vision_tower|multi_modal_projector|image_newline)(\.|$))", "model."),
    (r"(?<=vision_tower\.)vision_model\.", ""),
)
VIT: Rules = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(q|k|v)(uery|ey|alue)(?=\.)", r"attention.\1_proj"),
    (r"attention\.output\.dense(?=\.)", "attention.o_proj"),
    (r"intermediate\.dense(?=\.)", "mlp.fc1"),
    (r"(?<=\.)output\.dense(?=\.)", "mlp.fc2"),
)
DINO: Rules = (VIT[1], VIT[2], (r"mlp\.weights_out(?=\.)", "mlp.down_proj"))
QWEN_VL: Rules = (
    (r"^visual(?=\.)", "model.visual"),
    (r"^model(?=\.)(?!\.(language_model|visual)\.)", "model.language_model"),
)
GRANITE: Rules = (
    (r"block_sparse_moe\.input_linear\.weight$", "block_sparse_moe.experts.gate_up_proj"),
    (r"block_sparse_moe\.output_linear\.weight$", "block_sparse_moe.experts.down_proj"),
    (r"block_sparse_moe\.router\.layer\.weight$", "block_sparse_moe.router.weight"),
)
RENAMED: dict[str, Rules] = {
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "aya_vision"), TOWERS),
    **dict.fromkeys(("aria", "paligemma", "got_ocr2", "gemma3", "internvl", "mistral3"), TOWERS),
    **dict.fromkeys(("vit", "deit", "vit_mae", "vit_msn", "ijepa"), VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), DINO),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), QWEN_VL),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), GRANITE),
    **dict.fromkeys(("mixtral", "minimax"), ((r"\.block_sparse_moe\.", ".mlp."),)),
    "gpt_neox": ((r"^embed_out(?=\.)", "lm_head"),),
}
# What the checkpoint of a model with a head calls its body, and the body's children: hub files may lack the first.
BODIES = {
    "gpt2": ("transformer", "wte|wpe|h|ln_f"),
    "bloom": ("transformer", "word_embeddings|word_embeddings_layernorm|h|ln_f"),
    "bert": ("bert", "embeddings|encoder|pooler"),
    "roberta": ("roberta", "embeddings|encoder|pooler"),
    "xlm-roberta": ("roberta", "embeddings|encoder|pooler"),
    "distilbert": ("distilbert", "embeddings|transformer"),
}
EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<expert>[0-9]{1,9})\.(?P<leaf>[a-z0-9_]+)\.weight")
LEAVES = {
    **{"w1": ("gate_up_proj", 0, 2), "w3": ("gate_up_proj", 1, 2), "w2": ("down_proj", 0, 1)},
    **{"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2), "down_proj": ("down_proj", 0, 1)},
}
SPLIT = re.compile(r"(.*\.mlp)\.weights_in\.(weight|bias)")  # DINOv2's SwiGLU
TOLD = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}  # whose experts say that they are stored (in, out)
STRIDED = re.compile(r"(^|\.)encoder\.conv[12]$")  # Whisper's encoder asks them for their stride
# OPT's, BART's and Whisper's positions have an offset and other arguments than ids; DeBERTa reads the weight itself.
ODD_EMBEDDINGS = re.compile(r"(^|\.)(embed_positions|rel_embeddings)$")
HEADS = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2"), "cls.predictions.decoder"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "lm_head.decoder"),
    **{"distilbert": "vocab_projector", "albert": "predictions.decoder", "modernbert": "decoder"},
    **{"electra": "generator_lm_head", "whisper": "proj_out"},
}
HEADED = re.compile(r"ForCausalLM|LMHead|DoubleHeads|ForMaskedLM|ForPreTraining|ForConditionalGeneration")
SHARED = re.compile(r"((?:.*\.)?)shared")
TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)$")


def outline_checkpoint(tensors: Mapping[str, Shape], config: Config) -> Outline | str:
    """Outline the running model of a checkpoint, or say why it is not known.

    Parameters
    ----------
    tensors : mapping of str to tuple of int
        Every tensor's name and stored shape.
    config : dict
        Content of config.json; it is believed only where the tensors are those of the model that it describes.

    Returns
    -------
    Outline or str
        The latter is half a sentence.
    """
    found = find_outline(config)
    if isinstance(found, str):
        return found
    matrices = [name for name, shape in tensors.items() if len(shape) >= 2]
    placed = found.place(matrices)
    there = sum(misfit(placed[name], tensors[name], found) == "" for name in matrices)
    if 2 * there < len(matrices):
        return (
            f"{len(matrices) - there} of its {len(matrices)} matrices are not what its config makes of {found.source}"
        )
    return found


def misfit(places: tuple[Place, ...], shape: Shape, outline: Outline) -> str:
    """Say why a stored tensor is not what the running model has in its places; "" where it is."""
    for place in places:
        held = outline.shapes.get(place.name)
        if held is None:
            return f"{outline.source} has no parameter of this name"
        if place.moved:
            return f"{outline.source} rearranges it on loading ({place.moved})"
        if place.expert is not None:
            fits = len(held) == 3 and held[1:] == (place.parts * shape[0], *shape[1:])
        elif place.parts > 1:
            fits = (held[0] * place.parts, *held[1:]) == shape
        else:
            fits = held == shape or is_turned(shape, held)
        if not fits:
            return f"{outline.source} has '{place.name}' of shape {held}"
    return ""


def is_turned(shape: Shape, held: Shape) -> bool:
    """Tell whether a stack of experts is stored with the last two axes of the running one exchanged."""
    return len(shape) == 3 and shape != held and (shape[0], shape[2], shape[1]) == held


def place_tensors(names: Iterable[str], config: Config) -> dict[str, tuple[Place, ...]]:
    """Say where each stored tensor lies in the model that its library makes of the checkpoint.

    Parameters
    ----------
    names : iterable of str
        Tensor names, as stored; names of running models stay as they are.
    config : dict
        Content of config.json: model_type and architectures decide.

    Returns
    -------
    dict
        Stored name → one place; several where transformers splits the tensor.

    Examples
    --------
    >>> place_tensors(["h.0.ln_1.weight"], {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    {'h.0.ln_1.weight': (Place(name='transformer.h.0.ln_1.weight', expert=None, part=0, parts=1, moved=''),)}
    """
    listed = list(names)
    outline = find_outline(config)
    if not isinstance(outline, str):
        placed = outline.place(listed)
        if 2 * sum(places[0].name in outline.shapes for places in placed.values()) >= len(listed):
            return dict(placed)
    return place_by_table(listed, config)


def place_by_table(names: Iterable[str], config: Config) -> dict[str, tuple[Place, ...]]:
    """Say where stored tensors lie as ``place_tensors`` does, by our own table alone."""
    kind, headed = str(config.get("model_type", "")), _architecture(config)
    rules = LEGACY + RENAMED.get(kind, ())
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    bare = kind in RENAMED and RENAMED[kind] in (TOWERS, QWEN_VL) and headed.endswith("Model")
    places = {}
    for stored in names:
        name = _with_body(stored, kind, headed)
        for pattern, new in compiled:
            name = pattern.sub(new, name)
        name = name.removeprefix("model.") if bare else name
        places[stored] = _place(name, kind)
    return places


def _place(name: str, kind: str) -> tuple[Place, ...]:
    expert, split = EXPERT.fullmatch(name), SPLIT.fullmatch(name)
    if expert and expert["leaf"] in LEAVES:
        leaf, part, parts = LEAVES[expert["leaf"]]
        return (Place(f"{expert['stack']}.{leaf}", int(expert["expert"]), part, parts),)
    if split and RENAMED.get(kind) == DINO:
        return tuple(
            Place(f"{split[1]}.{leaf}.{split[2]}", None, i, 2) for i, leaf in enumerate(("gate_proj", "up_proj"))
        )
    return (Place(name),)


def _architecture(config: Config) -> str:
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def _with_body(name: str, kind: str, architecture: str) -> str:
    """Add the body's prefix where the architecture has a head around it, and drop it where it has none."""
    body, children = BODIES.get(kind, ("", ""))
    if not body or not architecture:
        return name
    if architecture.endswith("Model") and "LMHead" not in architecture and "DoubleHeads" not in architecture:
        return name.removeprefix(f"{body}.")
    return f"{body}.{name}" if re.match(rf"({children})\.", name) else name


def is_told(config: Config) -> bool:
    """Tell whether the running model marks its stacks as stored (experts, d_in, d_out), so that PEFT knows."""
    return config.get("model_type") in TOLD


def list_sharers(embedding: str, running: Collection[str], config: Config) -> tuple[tuple[str, str], ...]:
    """List the modules that may use a token embedding's weight beside it, tied or not.

    Parameters
    ----------
    embedding : str
        The embedding's module path in the running model.
    running : collection of str
        The running model's parameters.
    config : dict
        Content of config.json.

    Returns
    -------
    tuple of (path, kind)
        Kind embedding or linear. Where T5's or BART's ``shared`` is asked for, nothing else reads it.
    """
    if not TOKENS.search(embedding):
        return ()
    uses = []
    if shared := SHARED.fullmatch(embedding):
        stacks = (f"{shared[1]}{side}" for side in ("encoder", "decoder"))
        present = [stack for stack in stacks if any(name.startswith(f"{stack}.") for name in running)]
        uses += [(f"{stack}.embed_tokens", "embedding") for stack in present]
    if HEADED.search(_architecture(config)):
        uses.append((HEADS.get(str(config.get("model_type", "")), "lm_head"), "linear"))
    return tuple(uses)
