"""The house: floors, sizes, docstrings, and tables that say what they hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deltaspec
from deltaspec import options
from deltaspec.architecture.roles import ROLES
from deltaspec.extraction.ranks import POLICIES
from deltaspec.linalg.routes import ROUTES
from deltaspec.options.methods import METHOD_OPTIONS
from deltaspec.plots.style import ROLE_STYLE

ROOT = Path(deltaspec.__file__).resolve().parent
FILES = sorted(ROOT.rglob("*.py"))


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]


def test_a_module_imports_lower_floors_only():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    """STYLE: 250 lines a file, 45 lines a function with its docstring, and at most six positional parameters."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250
    for function in functions(path):
        assert function.end_lineno - function.lineno < 45, function.name
        positional = [a.arg for a in function.args.args if a.arg not in ("self", "cls")]
        assert len(positional) <= (5 if path.parent.name == "cli" else 6), (function.name, positional)


def test_the_house_as_a_whole_stays_small():
    """Half of the files have 120 lines at most; five functions may take a sixth parameter; Any is rare."""
    texts = [path.read_text(encoding="utf-8") for path in FILES if path.name != "__init__.py"]
    assert median(text.count("\n") for text in texts) <= 120
    long = [
        f"{path.name}:{function.name}"
        for path in FILES
        for function in functions(path)
        if len(
            [
                a
                for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
        )
        > 5
    ]
    assert len(long) <= 5, long
    lines = [line for text in texts for line in text.splitlines() if not line.startswith(("from ", "import "))]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) <= 200


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_public_names_resolve_lazily():
    code = (
        "import sys, deltaspec; assert 'torch' not in sys.modules; [getattr(deltaspec, n) for n in deltaspec.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deltaspec.nothing


def test_every_option_is_explained_where_it_stands():
    kinds = [kind for name in options.__all__ if is_dataclass(kind := getattr(options, name))]
    for kind in [*kinds, *METHOD_OPTIONS.values()]:
        for field in fields(kind):
            assert field.metadata.get("about", "").endswith(".") or is_dataclass(field.default_factory), field
            assert f"\n{field.name} : {field.type}" in kind.__doc__


def test_policies_are_one_table():
    assert set(options.POLICIES) == set(POLICIES)
    assert all(policy.description and policy.unit for policy in POLICIES.values())
    assert {name for name, policy in POLICIES.items() if policy.needs == "all"} == set(options.BUDGETS)


def test_tables_are_complete():
    assert set(ROLE_STYLE) >= set(ROLES)
    assert all(ROLES.values())
    assert {route.device for route in ROUTES} == {"cpu", "cuda"}


def declared():
    """Every requirement of the project, its extras and its build, by name."""
    content = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    lists = [content["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for one in lists for line in one]
    assert found
    return [one for one in found if one.name != project["name"]]


def constraints(text):
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [Requirement(line) for line in lines]  # fails on an address or an option


def test_what_is_pinned_lies_in_every_range_and_nothing_is_left_out():
    pinned = constraints((ROOT.parent / "scripts" / "constraints.txt").read_text(encoding="utf-8"))
    assert all(one.url is None and [part.operator for part in one.specifier] == ["=="] for one in pinned)
    for requirement in declared():
        versions = [one for one in pinned if canonicalize_name(one.name) == canonicalize_name(requirement.name)]
        assert versions, requirement.name
        for python in ("3.11", "3.12", "3.13"):
            here = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
            (one,) = [one for one in versions if one.marker is None or one.marker.evaluate(here)]
            (exact,) = one.specifier
            assert requirement.specifier.contains(exact.version), requirement.name
    assert {str(one.specifier) for one in pinned if one.name == "torch"} == {"==2.13.0"}


def test_the_lowest_that_is_tried_is_the_lowest_declared():
    command = [sys.executable, str(ROOT.parent / "scripts" / "lowest.py")]
    tried = constraints(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    lowest = {one.name: str(one.specifier).removeprefix("==") for one in tried}
    assert lowest.keys() == {one.name for one in declared()}
    for requirement in declared():
        assert requirement.specifier.contains(lowest[requirement.name])
        assert f">={lowest[requirement.name]}" in str(requirement.specifier).split(",")


def test_installed_packages_lie_in_the_declared_ranges():
    """Whatever the environment: the pinned, the lowest, the newest."""
    for requirement in declared():
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            continue
        assert requirement.specifier.contains(found, prereleases=True), requirement.name
