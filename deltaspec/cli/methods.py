"""The flags of every training method's options, readable without torch: which method takes which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from deltaspec.errors import OptionError
from deltaspec.options.training import TargetOptions

F = TypeVar("F", bound=Callable[..., Any])
BOTTLENECK: dict[str, type] = {"bottleneck": int, "activation": str, "bias": bool, "scale": float}
METHODS: dict[str, dict[str, type]] = {
    "full": {},
    "last_layers": {"blocks": int, "head": bool},
    "bitfit": {},
    "lora": {
        "rank": int,
        "alpha": float,
        "rslora": bool,
        "dora": bool,
        "init": str,
        "dropout": float,
        "bias": str,
        "lora_bias": bool,
        "lr_ratio": float,
    },
    "vblora": {
        "rank": int,
        "vectors": int,
        "vector_length": int,
        "topk": int,
        "logits_factor": float,
        "save_topk": bool,
        "index_bytes": int,
        "dropout": float,
    },
    "vera": {"rank": int, "d_initial": float, "projection_prng_key": int, "save_projection": bool, "dropout": float},
    "tied": {"rank": int, "d_initial": float, "dropout": float},
    "lora_xs": {"rank": int, "save_projection": bool, "dropout": float},
    "series": {**BOTTLENECK, "norm": bool, "placement": str, "cross": bool},
    "parallel": BOTTLENECK,
    "compacter": {
        "factors": int,
        "reduction": int,
        "activation": str,
        "norms": bool,
        "placement": str,
        "cross": bool,
    },
    "prefix": {"tokens": int},
    "prompt": {"tokens": int},
}
"""Method → the fields of its options with their types, in their order; a test keeps it equal to the methods' own."""

HELP = {
    "rank": "Rank of the update.",
    "alpha": "The update is scaled by α/rank.",
    "rslora": "Scale by α/√rank.",
    "dora": "Learn rows' lengths apart from their directions.",
    "init": "kaiming, or pissa: the base's top directions.",
    "lora_bias": "A bias of B, scaled with it.",
    "lr_ratio": "LoRA+: learning rate of B over that of A.",
    "dropout": "Share of the inputs left out in training.",
    "vectors": "Vectors of the bank.",
    "vector_length": "Their length; divides every side.",
    "topk": "Vectors that each piece is mixed from.",
    "logits_factor": "Learning rate of logits, as a multiple.",
    "save_topk": "Release only the best weights: smaller, no longer trainable.",
    "index_bytes": "Of a released index; 0: as PEFT.",
    "d_initial": "Every scale of a direction at the start.",
    "projection_prng_key": "Seed of the frozen projections.",
    "save_projection": "Store the frozen projections too.",
    "blocks": "The last so many blocks.",
    "head": "Also the head.",
    "bottleneck": "Inner width.",
    "activation": "gelu, relu, silu or tanh.",
    "bias": "Of lora: none, lora_only or all biases of the base; of others yes or no: biases inside.",
    "scale": "Factor on what is added.",
    "norm": "A layer norm before the bottleneck.",
    "placement": "After attention, mlp, or both.",
    "cross": "Also after a decoder's attention to the encoder.",
    "factors": "Terms of each Kronecker sum.",
    "reduction": "Bottlenecks are so many times narrower.",
    "norms": "Also train the base's own normalisations.",
    "tokens": "Virtual tokens.",
}
TARGET_HELP = {
    "targets": "all (linear layers of the blocks), attention, mlp, roles or module names by commas, or a regular "
    "expression; by default the method's own.",
    "depths": "Only these blocks: 0-5,11; negative from the end: -4: .",
}
WORDS = {"yes": True, "no": False}


def method_options() -> Callable[[F], F]:
    """Add --method, the flags of every method's options, and --targets, --depths and --split.

    Flags that the user leaves out are not set: defaults are those of the method's options.
    """

    def add(function: F) -> F:
        for name, text in reversed(HELP.items()):
            kinds, takers = _kinds(name), ", ".join(method for method, known in METHODS.items() if name in known)
            pair = f"/--no-{_spell(name)[2:]}" if kinds == {bool} else ""
            kind = None if pair else next(iter(kinds)) if len(kinds) == 1 else str
            function = click.option(_spell(name) + pair, name, type=kind, default=None, help=f"{text} [{takers}]")(
                function
            )
        text = "Adapt the parts of fused matrices one by one."
        function = click.option("--split", is_flag=True, help=text)(function)
        for name, text in reversed(TARGET_HELP.items()):
            function = click.option(_spell(name), default="", metavar="WHICH", help=text)(function)
        text = f"{', '.join(METHODS)}."
        return click.option("--method", default="lora", show_default=True, metavar="METHOD", help=text)(function)

    return add


def parse_method(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Take --method and its flags out of a command's arguments.

    Parameters
    ----------
    given : dict
        The command's arguments by name; those of methods are removed.

    Returns
    -------
    str, dict
        The method's name, and the fields of its options that the user set.

    Raises
    ------
    OptionError
        If there is no such method, it has no such option, or a value is of another type.
    """
    method = given.pop("method")
    chosen = {name: value for name in HELP if (value := given.pop(name, None)) is not None}
    if method not in METHODS:
        message = f"--method is '{method}': expected one of {', '.join(METHODS)}."
        raise OptionError(message)
    known = METHODS[method]
    for name in chosen:
        if name not in known:
            takes = f"it takes {', '.join(map(_spell, known))}" if known else "it has no options"
            message = f"{_spell(name)} does not belong to --method {method}: {takes}."
            raise OptionError(message)
        if known[name] is bool and isinstance(chosen[name], str):
            if chosen[name] not in WORDS:
                message = f"{_spell(name)} is '{chosen[name]}': --method {method} expects yes or no."
                raise OptionError(message)
            chosen[name] = WORDS[chosen[name]]
    return method, chosen


def parse_targets(given: dict[str, Any]) -> TargetOptions:
    """Take --targets, --depths and --split out of a command's arguments.

    Raises
    ------
    OptionError
        If --depths cannot be read.
    """
    return TargetOptions(**{field.name: given.pop(field.name) for field in fields(TargetOptions)})


def _kinds(name: str) -> set[type]:
    """Return the types that a flag has among methods: a boolean here and a word there is read as a word."""
    return {known[name] for known in METHODS.values() if name in known}


def _spell(name: str) -> str:
    return f"--{name.replace('_', '-')}"
