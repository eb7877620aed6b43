"""What a model's code does with its modules, read off its source: which it calls, and whose weights it takes itself.

LoRA adds its part where a module is called. Where other code multiplies by ``self.proj.weight`` or asks for
``self.conv.stride``, PEFT's wrapper changes nothing, or lacks the attribute.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

# Methods that do not take part when the model computes: they make, load, tie, resize or describe it.
APART = re.compile(
    r"__init__|__repr__|extra_repr|post_init|_?(re)?set_.*|[gs]et_.*embeddings?|_?init_.*|_?reset_.*|_?tie_.*|"
    r"_?resize_.*|_?load_.*|_?prune_.*|_?freeze_.*|_?backward_.*|gradient_.*|enable_.*|disable_.*|fuse_.*|unfuse_.*"
)
OUTSIDE = re.compile(r"(transformers\.(modeling_utils|generation|utils|integrations)|peft|accelerate)\b")
# Facts about a weight that are the same with factors beside it.
FACTS = {
    *("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_meta", "requires_grad", "is_floating_point"),
    *("new_zeros", "new_ones", "new_tensor", "new_empty", "new_full", "is_cuda", "element_size", "data_ptr", "layout"),
}
ASKING = {"isinstance", "hasattr", "getattr", "id", "type", "print"}
KEPT = {"weight", "bias", "in_features", "out_features", "embed_scale"}  # attributes that PEFT's wrappers have too
ASKED = "isinstance "
Chain = tuple[str, ...]
Aliases = dict[str, Chain]
"""Names of a function's variables → which modules they are."""


@dataclass(frozen=True, slots=True)
class Uses:
    """What a model's code does with its modules.

    Attributes
    ----------
    taken : dict
        Module path → what the code takes of that module itself, in words.
    named : set of str
        Modules that any code names.
    called : set of str
        Those that it names as they are: to call them, or to hand them on.
    typed : set of str
        Those of which it asks what they are.
    """

    taken: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    typed: set[str] = field(default_factory=set)


def find_uses(model: nn.Module) -> Uses:
    """Look through the source of every class of a model."""
    modules = dict(model.named_modules())
    uses = Uses()
    for path, module in modules.items():
        cls: Any = type(module)
        for chain, harmless in _chains(cls):
            for target, rest in _resolve(module, path, chain):
                if target == path:
                    continue  # its own weight, which wrappers leave to it
                uses.named.add(target)
                if not rest or rest[0] == "forward":
                    uses.called.add(target)
                what = "" if harmless else _describe(modules[target], rest)
                if what:
                    uses.taken.setdefault(target, what)
                if what and rest[0].startswith(ASKED):
                    uses.typed.add(target)
    return uses


def _resolve(module: nn.Module, path: str, chain: Chain) -> Iterator[tuple[str, Chain]]:
    """Follow a chain of attributes from a module; yield each module that it ends at, with what is left of it."""
    child = next((found for name, found in module.named_children() if chain and name == chain[0]), None)
    if chain[:1] == ("*",):
        for name, found in module.named_children():
            yield from _resolve(found, f"{path}.{name}".lstrip("."), chain[1:])
    elif child is not None:
        yield from _resolve(child, f"{path}.{chain[0]}".lstrip("."), chain[1:])
    elif path:
        yield path, chain


def _describe(module: nn.Module, rest: Chain) -> str:
    """Say what is taken of a module; "" where that is nothing which factors would change."""
    if not rest or (rest[0] == "weight" and len(rest) > 1 and (rest[1] in FACTS or rest[1].startswith(ASKED))):
        return ""
    if rest[0] == "weight":
        return "the model reads this weight itself, so that factors beside it have no effect"
    if rest[0].startswith(ASKED):
        classes = {cls.__name__ for cls in type(module).__mro__} - {"Module", "object"}
        asked = classes & set(rest[0].removeprefix(ASKED).split(","))
        return f"the model asks whether this module is a {min(asked)}, which PEFT's wrapper is not" if asked else ""
    if rest[0] in KEPT or hasattr(nn.Module, rest[0]) or not hasattr(module, rest[0]):
        return ""
    return f"the model reads '{rest[0]}' of this module, which PEFT's wrapper lacks"


@cache
def _chains(cls: Any) -> tuple[tuple[Chain, bool], ...]:
    """List the chains of attributes of ``self`` in a class, each with whether only a fact is asked of it."""
    found: defaultdict[Chain, bool] = defaultdict(lambda: True)
    seen: set[str] = set()
    for parent in cls.__mro__:
        if parent in (nn.Module, object) or OUTSIDE.match(parent.__module__):
            continue
        for function in _functions(parent):
            if APART.fullmatch(function.name) or function.name in seen:
                continue  # made, not run; or overridden by a class that comes first
            seen.add(function.name)
            for chain, harmless in _chains_of(function):
                found[chain] = found[chain] and harmless
    return tuple(found.items())


def _functions(cls: type) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time
        return []
    body: list[Any] = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
    return [node for node in body if isinstance(node, ast.FunctionDef)]


def _chains_of(function: ast.FunctionDef) -> Iterator[tuple[Chain, bool]]:
    """Yield the longest chains of a function, and whether each stands where only a fact is asked."""
    for node, above, known in _walk(function, None, {"self": ()}):
        if isinstance(above, ast.Attribute) or (isinstance(above, ast.Subscript) and above.value is node):
            continue
        chain = _unwind(node, known)
        if chain and not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            asked = _asked_classes(node, above)
            yield (*chain, *asked), not asked and _only_asks(node, above)


def _walk(node: ast.AST, above: ast.AST | None, known: Aliases) -> Iterator[tuple[ast.AST, ast.AST | None, Aliases]]:
    """Yield every node with the one around it, and what the variables are there."""
    yield node, above, known
    inner = known
    if isinstance(node, ast.For):
        inner = {**known, **_names(_loop_pairs(node), known, "*")}
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        inner = dict(known)
        for loop in node.generators:
            inner |= _names(_loop_pairs(loop), inner, "*")
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        known.update(_names([(node.targets[0], node.value)], known))
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, node, inner)


def _names(pairs: list[tuple[ast.expr, ast.expr]], known: Aliases, *index: str) -> Aliases:
    """Return what variables become that are set to modules, or run over them."""
    named = [(target.id, value) for target, value in pairs if isinstance(target, ast.Name)]
    return {name: (*chain, *index) for name, value in named if (chain := _unwind(value, known))}


def _loop_pairs(node: ast.For | ast.comprehension) -> list[tuple[ast.expr, ast.expr]]:
    """Pair a loop's variables with what each runs over."""
    loop, target = node.iter, node.target
    called = loop.func.id if isinstance(loop, ast.Call) and isinstance(loop.func, ast.Name) else ""
    if not isinstance(loop, ast.Call) or called not in ("enumerate", "zip", "reversed"):
        return [(target, loop)]
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    return list(zip(targets[called == "enumerate" :], loop.args, strict=False))


def _unwind(node: ast.AST, known: Aliases) -> Chain:
    """Return the names of ``self.a.b[0].c``, an index as ``*``; empty where it begins with something else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif not isinstance(node.slice, ast.Slice):
            names.append("*")
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in known:
        return ()
    return (*known[node.id], *reversed(names))


def _asked_classes(node: ast.AST, above: ast.AST | None) -> Chain:
    """Return the classes of which a module is asked whether it is one, as one more name of its chain."""
    if not isinstance(above, ast.Call) or not isinstance(above.func, ast.Name) or above.func.id != "isinstance":
        return ()
    if len(above.args) != 2 or above.args[0] is not node:
        return ()
    classes = above.args[1].elts if isinstance(above.args[1], ast.Tuple) else [above.args[1]]
    return (ASKED + ",".join(c.attr if isinstance(c, ast.Attribute) else getattr(c, "id", "") for c in classes),)


def _only_asks(node: ast.AST, above: ast.AST | None) -> bool:
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and node in above.args:
        return above.func.id in ASKING
    return isinstance(above, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in above.ops)
