"""Do the tests bite? Change one thing at a time in a room's code, at random, and see whether its tests fail.

    python scripts/mutate.py linalg spectra --count 100 --seed 1 --out mutants.json    # any release can be tested again
    python scripts/mutate.py --again mutants.json    # those that lived, after tests were added

Comparisons, arithmetic, and/or, not, numbers (±1, × 2), conditions, the order of two arguments, keyword arguments,
bounds of slices, min/max and any/all are changed, statements removed; texts, annotations and decorators are not.
No file is written: each mutant is compiled in memory, in a process forked from one that has torch loaded, which runs
the room's tests until one fails, then its further ones. A mutant that changes nothing that can be observed lives, so
that a person must judge the rest: 100 % is no aim. One core, 2 s for a mutant that dies; needs fork and extra "test".
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
ALREADY = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
PATIENCE = 4  # times as long as the unchanged code, and ten seconds more: then a mutant hangs, and counts as found


@dataclass(frozen=True)
class Room:
    """Files of the package that belong together, the tests run on each mutant, and those that the living meet too."""

    files: str
    tests: tuple[str, ...]
    further: tuple[str, ...] = ()


ROOMS = {
    "linalg": Room("linalg/*.py", ("linalg",), ("property", "extraction")),
    "spectra": Room("spectra/*.py", ("spectra",), ("property",)),
    "extraction": Room("extraction/*.py", ("extraction",), ("**/test_extract.py",)),
    "pairing": Room("pairing/*.py", ("pairing",), ("io/test_kohya.py", "**/test_combine.py")),
    "delta": Room("delta.py", ("test_delta.py",), ("property",)),
    "store": Room("store/*.py", ("store", "archives"), ("workflows/**/test_trajectory.py",)),
}

_ORDER = {ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE)}
_PAIRS = ((ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
COMPARISONS = _ORDER | {one: (other,) for pair in _PAIRS for one, other in (pair, pair[::-1])}
_TWINS = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or))
OPERATORS = {one: other for pair in _TWINS for one, other in (pair, pair[::-1])}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}
IDENTITY = ("file", "function", "before", "after")  # of a change, which may have moved since
UNTOUCHED = {"annotation", "returns", "decorator_list", "type_comment"}


@dataclass(frozen=True)
class Place:
    """One change: in which room, file, line, column and function, and from what to what."""

    room: str
    file: str
    line: int
    column: int
    function: str
    before: str
    after: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node may be changed into."""
    match node:
        case ast.Compare():
            for i, new in ((i, new) for i, op in enumerate(node.ops) for new in COMPARISONS[type(op)]):
                yield _with(node, ops=[*node.ops[:i], new(), *node.ops[i + 1 :]])
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 1.0)
        case ast.If() | ast.IfExp() if not isinstance(node.test, ast.Compare):
            yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Call():
            yield from _calls(node)
        case ast.Slice():
            sides = [side for side in ("lower", "upper") if not isinstance(getattr(node, side), ast.Constant | None)]
            for side, op in itertools.product(sides, (ast.Add(), ast.Sub())):
                yield _with(node, **{side: ast.BinOp(getattr(node, side), op, ast.Constant(1))})
    match node:
        case ast.Raise() | ast.Break() | ast.AugAssign() | ast.Expr(ast.Call()) | ast.Assign([ast.Subscript()]):
            yield ast.Pass()


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    if isinstance(node.func, ast.Name) and node.func.id in OPPOSITES:
        yield _with(node, func=ast.Name(OPPOSITES[node.func.id]))
    elif len(node.args) > 1 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for i in (i for i, keyword in enumerate(node.keywords) if keyword.arg):
        yield _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    return type(node)(**(dict(ast.iter_fields(node)) | fields))


def mutants(room: str, path: Path) -> Iterator[tuple[Place, ast.Module]]:
    """Yield every change of a file; the tree is changed only until the next one is asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, put, function in list(_nodes(tree, "")):
        for new in variants(node):
            texts = (ast.unparse(one).partition("\n")[0] for one in (node, new))
            position = getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
            place = Place(room, str(path.relative_to(ROOT)), *position, function, *texts)
            put(ast.copy_location(new, node))
            yield place, tree
            put(node)


def _nodes(parent: ast.AST, function: str) -> Iterator[tuple[ast.AST, Callable[[ast.AST], None], str]]:
    """Yield each node, how to put another in its place, and the function that it is in; nothing of texts."""
    for field, value in ast.iter_fields(parent):
        for index, node in enumerate(value) if isinstance(value, list) else ((None, value),):
            if field in UNTOUCHED or not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
                continue
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "message":
                continue
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            inside = f"{function}.{node.name}".strip(".") if named else function
            put = partial(setattr, parent, field) if index is None else partial(value.__setitem__, index)
            yield node, put, inside
            yield from _nodes(node, inside)


class _Changed(SourceFileLoader):
    """Loads a changed tree instead of the file; a finder of that module alone."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        super().__init__(".".join(path.relative_to(ROOT).with_suffix("").parts), str(path))
        self.tree = tree

    def get_code(self, fullname: str) -> object:
        return compile(ast.fix_missing_locations(self.tree), self.path, "exec", dont_inherit=True)

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None


def run_tests(tests: tuple[str, ...]) -> int:
    """Run tests in this process until one fails; return pytest's exit code."""
    files = [str(file) for pattern in tests for file in sorted((ROOT / "tests").glob(pattern))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main(["-x", "-q", "--tb=no", "-W", ALREADY, *files]))


def survives(path: Path, tree: ast.Module, tests: tuple[str, ...], *, seconds: float) -> bool:
    """Tell whether the tests pass with a changed file, in a process of their own."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(seconds))
        code = 1
        try:
            sys.meta_path.insert(0, _Changed(path, tree))  # type: ignore[arg-type]
            code = run_tests(tests)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def time_tests(tests: tuple[str, ...]) -> float:
    """Return how long a mutant may take; loads what the tests import, and forgets the package and the tests again."""
    start, unchanged = time.monotonic(), ROOT / "deltaspec" / "errors.py"
    failed = run_tests(tests)
    seconds = 10 + PATIENCE * (time.monotonic() - start)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("deltaspec", "tests")]:
        del sys.modules[name]
    if failed or not survives(unchanged, ast.parse(unchanged.read_text(encoding="utf-8")), tests, seconds=seconds):
        sys.exit(f"{' '.join(tests)} fail on the unchanged code: mend that first.")
    return seconds


def test_room(name: str, chosen: list[Place], minutes: float) -> Iterator[dict[str, object]]:
    """Try the chosen changes of one room in their order until the time is over; yield a row for each."""
    room = ROOMS[name]
    limits = [(tests, time_tests(tests)) for tests in (room.tests, room.further) if tests]
    files, over = {ROOT / place.file for place in chosen}, time.monotonic() + 60 * minutes
    trees = {place: copy.deepcopy(tree) for path in files for place, tree in mutants(name, path) if place in chosen}
    for place in chosen:
        if time.monotonic() > over:
            return
        path = ROOT / place.file
        lives = all(survives(path, trees[place], tests, seconds=seconds) for tests, seconds in limits)
        word = "LIVES" if lives else "died "
        print(word, f"{place.file}:{place.line} {place.before}  →  {place.after}", flush=True)
        yield {**asdict(place), "lives": lives}


def main() -> None:
    """Choose, try, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", help=f"of {', '.join(ROOMS)}; all without")
    parser.add_argument("--count", type=int, default=60, help="changes of each room")
    parser.add_argument("--minutes", type=float, default=60, help="stop with a room after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a row for each change, as JSON")
    parser.add_argument("--again", type=Path, help="try those that lived in a file that --out wrote")
    options = parser.parse_args()
    os.chdir(ROOT)
    settings.register_profile("mutants", database=None, derandomize=True)
    settings.load_profile("mutants")
    old = json.loads(options.again.read_text(encoding="utf-8")) if options.again else []
    lived = {tuple(row[part] for part in IDENTITY) for row in old if row["lives"]}
    rows: list[dict[str, object]] = []
    for name in options.rooms or ROOMS:
        paths = sorted((ROOT / "deltaspec").glob(ROOMS[name].files))
        chosen = known = [place for path in paths for place, _ in mutants(name, path)]
        if options.again:
            chosen = [place for place in known if tuple(getattr(place, part) for part in IDENTITY) in lived]
        elif options.count < len(known):
            chosen = random.Random(options.seed).sample(known, options.count)
        before = len(rows)
        for row in test_room(name, chosen, options.minutes) if chosen else ():
            rows.append(row)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        died = sum(not row["lives"] for row in rows[before:])
        print(f"{name}: {died} of {len(rows) - before} died ({len(known)} are possible)")


if __name__ == "__main__":
    main()
