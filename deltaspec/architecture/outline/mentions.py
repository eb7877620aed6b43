"""What a class's code names of its own modules: every chain ``self.a.b.weight``, where it stands, and on what terms."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

# Methods that do not take part when the model computes: they make, load, tie, resize or describe it.
APART = re.compile(
    r"__init__|__repr__|extra_repr|post_init|_?(re)?set_.*|[gs]et_.*embeddings?|_?init_.*|.*init_weights?.*|_?reset_.*|_?tie_.*|"
    r"_?resize_.*|_?load_.*|_?prune_.*|_?freeze_.*|_?backward_.*|gradient_.*|enable_.*|disable_.*|fuse_.*|unfuse_.*"
)
OUTSIDE = re.compile(r"(transformers\.(modeling_utils|generation|utils|integrations)|peft|accelerate)\b")
ASKING = {"isinstance", "hasattr", "getattr", "id", "type", "print"}
ASKED = "isinstance "  # begins the last name of a chain where code asks of which of these classes it is
HANDED = "handed on"  # ends a chain that is an argument of a call
ALL = "**"  # whatever lies inside: what a variable runs over is not known
LEAVES = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "Conv1D"}
Chain = tuple[str, ...]
Aliases = dict[str, Chain]
"""Names of a function's variables → which modules they are."""
Guards = tuple[tuple[ast.expr, bool], ...]
"""The conditions around a statement, each with what it must be."""


@dataclass(frozen=True, slots=True)
class Mention:
    """One chain of names that begins at ``self``, an index written ``*``; ASKED, HANDED and ALL say more.

    ``harmless`` where it only asks a fact. ``guards`` are the conditions under which it runs.
    """

    chain: Chain
    harmless: bool
    guards: Guards = ()

    def may_run(self, module: nn.Module) -> bool:
        """Tell whether a module's own settings let it run; what depends on anything else may."""
        return all(_value(test, module) is not (not wanted) for test, wanted in self.guards)


@cache
def list_mentions(cls: Any) -> tuple[Mention, ...]:
    """List what the methods of a class, and of its bases, name; those that only make, load or describe it left out."""
    found: list[Mention] = []
    seen: set[str] = set()
    for parent in cls.__mro__:
        if parent in (nn.Module, object) or OUTSIDE.match(parent.__module__):
            continue
        for function in _functions(parent):
            if not APART.fullmatch(function.name) and function.name not in seen:
                found += _of_function(function)
            seen.add(function.name)  # overridden by a class that comes first
    return _without_doubles(found)


def _without_doubles(found: list[Mention]) -> tuple[Mention, ...]:
    """Keep each chain once for the same conditions, harmless where it is everywhere."""
    groups: defaultdict[tuple[Chain, tuple[tuple[str, bool], ...]], list[Mention]] = defaultdict(list)
    for mention in found:
        groups[mention.chain, tuple((ast.dump(test), wanted) for test, wanted in mention.guards)].append(mention)
    return tuple(next((m for m in group if not m.harmless), group[0]) for group in groups.values())


def _functions(cls: type) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time
        return []
    body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
    return [node for node in body if isinstance(node, ast.FunctionDef)]


def _of_function(function: ast.FunctionDef) -> Iterator[Mention]:
    """Yield the longest chains of a function."""
    for node, above, known, guards in _walk(function, None, {"self": ()}, ()):
        if isinstance(above, ast.Attribute) or (isinstance(above, ast.Subscript) and above.value is node):
            continue
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            continue
        chain, asked = _unwind(node, known), _asked_classes(node, above)
        if chain:
            more = asked or _handed_on(above, node)
            yield Mention((*chain, *more), not more and _only_asks(node, above), guards)
        elif isinstance(node, ast.Name) and asked and LEAVES & set(asked[0].removeprefix(ASKED).split(",")):
            yield Mention((ALL, *asked), harmless=False, guards=guards)


Step = tuple[ast.AST, ast.AST | None, Aliases, Guards]


def _walk(node: ast.AST, above: ast.AST | None, known: Aliases, guards: Guards) -> Iterator[Step]:
    """Yield every node with the one around it, what the variables are there, and the conditions around it."""
    yield node, above, known, guards
    inner = known
    if isinstance(node, ast.For):
        inner = {**known, **_names(_loop_pairs(node), known, "*")}
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        inner = dict(known)
        for loop in node.generators:
            inner |= _names(_loop_pairs(loop), inner, "*")
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        known.update(_names([(node.targets[0], node.value)], known))
    for field, value in ast.iter_fields(node):
        branch = isinstance(node, ast.If | ast.IfExp) and field in ("body", "orelse")
        around = (*guards, (node.test, field == "body")) if branch else guards  # type: ignore[attr-defined]
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child, node, inner, around)


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
    """Return the names of ``self.a.b[0].c``; empty where it begins with something else."""
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


def _handed_on(above: ast.AST | None, node: ast.AST) -> Chain:
    """Return HANDED where something is an argument: code elsewhere may do with it what it likes."""
    if isinstance(above, ast.keyword):
        return (HANDED,)
    if not isinstance(above, ast.Call) or node not in above.args:
        return ()
    name = above.func.id if isinstance(above.func, ast.Name) else ""
    return () if name in ASKING | {"enumerate", "zip", "reversed", "len", "list", "range"} else (HANDED,)


def _only_asks(node: ast.AST, above: ast.AST | None) -> bool:
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and node in above.args:
        return above.func.id in ASKING
    return isinstance(above, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in above.ops)


def _value(test: ast.expr, module: nn.Module) -> bool | None:
    """Work out a condition from a module's settings; None where it depends on more, as on an argument."""
    if isinstance(test, ast.BoolOp):
        parts, decides = [_value(part, module) for part in test.values], isinstance(test.op, ast.Or)
        return decides if decides in parts else None if None in parts else not decides
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _value(test.operand, module)
        return None if inner is None else not inner
    for node in ast.walk(test):
        plain = isinstance(node, ast.Compare | ast.Attribute | ast.Name | ast.Constant | ast.cmpop | ast.expr_context)
        if not plain or getattr(node, "id", "self") != "self" or getattr(node, "attr", "") == "training":
            return None
    try:  # a comparison that the installed library makes, of its module's own settings
        code = compile(ast.Expression(test), "", "eval")
        return bool(eval(code, {"__builtins__": {}}, {"self": module}))
    except Exception:  # an attribute that is not there
        return None
