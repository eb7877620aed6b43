"""What a model's code does with its modules, read off its source: which it calls, and whose weights it takes itself.

LoRA adds its part where a module is called. Where other code multiplies by ``self.proj.weight`` or asks for
``self.conv.stride``, PEFT's wrapper changes nothing, or lacks the attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltaspec.architecture.outline.mentions import ALL, ASKED, HANDED, Chain, list_mentions

# Facts about a weight that are the same with factors beside it.
FACTS = {
    *("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_meta", "requires_grad", "is_floating_point"),
    *("new_zeros", "new_ones", "new_tensor", "new_empty", "new_full", "is_cuda", "element_size", "data_ptr", "layout"),
}
KEPT = {"weight", "bias", "in_features", "out_features", "embed_scale"}  # attributes that PEFT's wrappers have too
ASIDE = "the model also keeps this module in a list of its own, where PEFT puts no wrapper"
ELSEWHERE = "the model hands this module to other code, which may do more than call it"
READ = "the model reads this weight itself, so that factors beside it have no effect"
GIVEN = "get_input_embeddings"
# Code that no caller in its library reaches, whatever the settings: the argument that leads there is never given.
UNREACHED = {("DisentangledSelfAttention", ("in_proj", "weight", "chunk"))}


@dataclass(frozen=True, slots=True)
class Uses:
    """What a model's code does with its modules.

    Attributes
    ----------
    taken : dict
        Module path → what the code takes of that module itself, in words.
    named : set of str
        Modules that any code names.
    typed : set of str
        Those that must stay what they are: it asks for their class, or keeps them elsewhere too.
    asked : set of str
        Attributes of their own that modules look at: settings, mostly.
    """

    taken: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    typed: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)


def find_uses(model: nn.Module) -> Uses:
    """Look through the source of every class of a model."""
    modules = dict(model.named_modules(remove_duplicate=False))  # one module may have several names
    uses = Uses()
    for path in _kept_aside(modules):
        uses.taken[path] = ASIDE
        uses.typed.add(path)
    for path, module in modules.items():
        cls: Any = type(module)
        for mention in list_mentions(cls):
            if (cls.__name__, mention.chain) in UNREACHED or not mention.may_run(module):
                continue
            uses.asked.add(mention.chain[-1])
            for target, rest in _resolve(module, path, mention.chain):
                if rest == (GIVEN,):
                    uses.named.update(_given(modules, target))
                if target == path:
                    continue  # its own weight, which wrappers leave to it
                uses.named.add(target)
                what = "" if mention.harmless else _describe(modules[target], rest)
                if what and uses.taken.get(target) != READ:
                    uses.taken[target] = what
                if what and rest[0].startswith(ASKED):
                    uses.typed.add(target)
    return uses


def _kept_aside(modules: dict[str, nn.Module]) -> list[str]:
    """List modules that lie in a plain list, tuple or dict of another, which runs them from there."""
    aside: set[int] = set()
    for module in modules.values():
        for value in vars(module).values():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if value is not module._modules:
                aside.update(id(item) for item in items if isinstance(item, nn.Module))
    return [path for path, module in modules.items() if id(module) in aside]


def _given(modules: dict[str, nn.Module], path: str) -> list[str]:
    """List the paths of the embedding that a model hands out, which whoever asks for it then calls."""
    owner: Any = modules[path]
    try:
        given = owner.get_input_embeddings()
    except Exception:  # what a class raises that has none
        return []
    return [other for other, module in modules.items() if module is given]


def _resolve(module: nn.Module, path: str, chain: Chain) -> Iterator[tuple[str, Chain]]:
    """Follow a chain of attributes from a module; yield each module that it ends at, with what is left of it."""
    child = next((found for name, found in module.named_children() if chain and name == chain[0]), None)
    if chain[:1] == (ALL,):
        for name, _ in module.named_modules(remove_duplicate=False):
            yield f"{path}.{name}".strip("."), chain[1:]
    elif chain[:1] == ("*",):
        for name, found in module.named_children():
            yield from _resolve(found, f"{path}.{name}".lstrip("."), chain[1:])
    elif child is not None:
        yield from _resolve(child, f"{path}.{chain[0]}".lstrip("."), chain[1:])
    elif path or chain == (GIVEN,):
        yield path, chain


def _describe(module: nn.Module, rest: Chain) -> str:
    """Say what is taken of a module; "" where that is nothing which factors would change."""
    if not rest or (rest[0] == "weight" and len(rest) > 1 and (rest[1] in FACTS or rest[1].startswith(ASKED))):
        return ""
    if rest[0] == "weight":
        return READ
    if rest[0] == HANDED:
        leaf = isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return ELSEWHERE if leaf else ""
    if rest[0].startswith(ASKED):
        classes = {cls.__name__ for cls in type(module).__mro__} - {"Module", "object"}
        asked = classes & set(rest[0].removeprefix(ASKED).split(","))
        return f"the model asks whether this module is a {min(asked)}, which PEFT's wrapper is not" if asked else ""
    if rest[0] in KEPT or hasattr(nn.Module, rest[0]) or not hasattr(module, rest[0]):
        return ""
    return f"the model reads '{rest[0]}' of this module, which PEFT's wrapper lacks"
