"""README and manual are true: every code block runs, every flag, path and link in them exists, reference is current.

A line of a ``sh`` block is one of three things: a ``deltaspec`` command, which is run on tiny models, or only parsed
where it names a model of the hub; an installation, whose extras and files are looked up; or a script of ours, which
must be there and be valid bash. ``text`` blocks show output, or other programs. Anything else is a failure.
"""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from deltaspec.architecture.roles import ROLES
from deltaspec.cli.help import list_topics
from deltaspec.cli.main import COMMANDS, MANUAL, cli
from deltaspec.extraction.ranks import POLICIES
from deltaspec.plots.figures import FIGURES
from deltaspec.plots.trajectory import STEP_FIGURES
from deltaspec.spectra.metrics import METRICS
from deltaspec.training.methods import METHODS
from tests.tiny_models import build, perturb, save, write_text
from tests.workflows.training.train_case import write_classes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "deltaspec" / "manual").glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUB = ("meta-llama/",)  # owners of models that documents name; commands with these are parsed, not run
PLACES = ("deltaspec", "figures", "scripts", "tests")
SUFFIXES = (".py", ".sh", ".md", ".toml", ".txt", ".csv", ".png")
OTHERS = {"--max-lora-rank", "--enable-lora", "--lora-modules", "--no-deps"}  # flags of other programs
SWITCHES = {"scripts/test.sh": {"-m", "--lowest", "--newest", "--bare"}, "scripts/make_figures.sh": {"--experiment"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(page, *languages):
    return [body for language, body in BLOCK.findall(TEXTS[page]) if language in languages]


def lines(page):
    """The commands of a page's sh blocks, without comments, continued lines joined."""
    found = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in found if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the documents name: base/, tuned/, two adapters, a training folder, and texts."""
    root = tmp_path_factory.mktemp("named")
    save(build("llama"), root / "base")
    for seed, side in enumerate(("tuned", "tuned-other"), 1):
        save(perturb(build("llama"), seed=seed), root / side)
    write_classes(root / "words.csv")
    table = (root / "words.csv").read_text()
    (root / "train.csv").write_text(table.replace("text,label", "text,category", 1))
    (root / "other.csv").write_text(table.replace("text,label", "text,intent", 1))
    for name in ("corpus.txt", "heldout.txt"):
        write_text(root / name, lines=30)
    texts = [line for line in (root / "corpus.txt").read_text().splitlines() if line]
    (root / "corpus.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in texts))
    for words in (
        f"extract {root}/base {root}/tuned --rank 4 -o {root}/adapter",
        f"extract {root}/base {root}/tuned-other --rank 2 -o {root}/other",
        f"train {root}/base --data {root}/corpus.txt --task causal-lm --rank 2 --steps 4 --checkpoint-every 2 "
        f"-o {root}/training",
    ):
        run(words.split())
    return root


def run(words):
    done = CliRunner().invoke(cli, [*words, "--quiet"] if "--quiet" in flags_of(words[0]) else words)
    assert done.exit_code == 0, (words, done.output)


def flags_of(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    return {flag for item in command.params for flag in (*item.opts, *item.secondary_opts)} | {"--help", "-h"}


def check_installation(words):
    """Pip with extras of ours, constraints that are there, or names of tools."""
    for before, word in itertools.pairwise(words):
        assert before != "-c" or (ROOT / word).is_file()
        if extras := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def check_script(words):
    """A script of ours, in bash or Python, with switches that it knows."""
    script = ROOT / words[1]
    assert script.is_file(), words
    if words[0] == "bash":
        subprocess.run(["bash", "-n", str(script)], check=True)
    known = SWITCHES.get(words[1], set())
    assert {word for word in words[2:] if word.startswith("-")} <= known, words


@pytest.mark.parametrize("page", TEXTS)
def test_every_block_runs(page, models, tmp_path, monkeypatch):
    found = BLOCK.findall(TEXTS[page])
    assert len(re.findall(r"```|~~~", TEXTS[page])) == 2 * len(found), "a block that BLOCK does not see is not run"
    assert {language for language, _ in found} <= {"sh", "python", "text"}
    for source in models.iterdir():
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / source.name)
    monkeypatch.chdir(tmp_path)
    for words in lines(page):
        if words[0] == "deltaspec" and any(word.startswith(HUB) for word in words):
            command = cli.get_command(click.Context(cli), words[1])
            command.make_context(words[1], words[2:])
        elif words[0] == "deltaspec":
            run(words[1:])
        elif words[:2] == ["pip", "install"]:
            check_installation(words)
        elif words == ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").is_file()
        else:
            assert words[0] in ("bash", ".venv-test/bin/python"), f"{page}: no rule for {shlex.join(words)}"
            check_script(words)
    for body in blocks(page, "python"):
        exec(compile(body, f"{page}.md", "exec"), {"__name__": "documents"})


def test_commands_inside_sentences_exist():
    """`deltaspec …` and `--flag` in running text."""
    everything = set().union(*(flags_of(name) for name in COMMANDS))
    known = everything | OTHERS | set().union(*SWITCHES.values())
    for page, text in TEXTS.items():
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", text)):
            words = span.replace("…", "").split()
            if words[0] == "deltaspec" and len(words) > 1:
                assert words[1] in COMMANDS or words[1] in ("COMMAND", "--version"), (page, span)
                if words[1] == "help":
                    assert set(words[2:]) <= {*list_topics(), "TOPIC", "[TOPIC]"}, (page, span)
                own = flags_of(words[1]) if words[1] in COMMANDS else everything
                assert {word for word in words[2:] if word.startswith("--")} <= own, (page, span)
            elif span.startswith("--"):
                assert {word for word in re.split(r"[ ,=]+", span) if word.startswith("--")} <= known, (page, span)


def test_paths_and_links_exist():
    for page in PAGES:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (page.parent / link).exists(), (page.name, link)
        for span in re.findall(r"`([\w./-]+)`", text):
            if "/" in span and (span.split("/")[0] in PLACES or span.endswith(SUFFIXES)):
                assert (ROOT / span).exists() or (ROOT / "deltaspec" / span).exists(), (page.name, span)


def test_the_reference_is_current():
    """Otherwise: python scripts/make_reference.py."""
    made = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))["make_pages"]()
    assert {f"{name}.md" for name in TEXTS if name.startswith("reference-")} == set(made)
    for name, text in made.items():
        assert TEXTS[name.removesuffix(".md")] == text, name


def test_the_manual_explains_what_the_tables_hold():
    """By hand, beside the generated reference."""
    assert all(f"`{name}`" in TEXTS["numbers"] for name in METRICS)
    assert all(f"`{name}`" in TEXTS["numbers"] for name in (*FIGURES, *STEP_FIGURES))
    assert all(f"`--{name.replace('_', '-')}`" in TEXTS["adapters"] for name in POLICIES)
    assert all(f"`{name}`" in TEXTS["training"] for name in METHODS)
    assert all(f"`{name}`" in TEXTS["reference-names"] for name in ROLES)
    assert all(f"deltaspec {name} " in TEXTS[MANUAL.get(name, "README")] for name in COMMANDS)
    assert {words[1] for page in TEXTS for words in lines(page) if words[0] == "deltaspec"} == set(COMMANDS)


def test_the_map_has_every_room():
    package = ROOT / "deltaspec"
    rooms = [path for path in package.iterdir() if path.is_dir() and path.name not in ("__pycache__", "manual")]
    rooms += [path for floor in ("workflows", "training") for path in (package / floor).iterdir() if path.is_dir()]
    for name in {path.name for path in rooms} - {"__pycache__"}:
        assert re.search(rf"\b{name}\b", TEXTS["architecture"]), name


def test_the_readme_is_a_front_door():
    """Some 900 words; whatever needs more is a page of the manual."""
    assert len(TEXTS["README"].split()) <= 1000
    assert all(f"deltaspec/manual/{topic}.md" in TEXTS["README"] for topic in list_topics() if "reference" not in topic)


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_makes_its_environment_under_constraints(script):
    """A folder, extras, and a file of constraints that is there, or one that the script made."""
    for call in re.findall(r"^ *make_environment +([^({\n]+)$", script.read_text(encoding="utf-8"), re.MULTILINE):
        folder, extras, constraints = shlex.split(call)
        assert folder.startswith(".venv")
        assert set(filter(None, extras.strip("[]").split(","))) <= {*PROJECT["optional-dependencies"], "$extras"}
        assert constraints == "$constraints" or (ROOT / constraints).is_file()


def test_the_demo_leaves_no_trace_in_git():
    demo = (ROOT / "scripts" / "demo.sh").read_text(encoding="utf-8")
    written = re.findall(r" -o (\S+)", demo)
    assert len(written) == 3
    assert all(place.startswith("runs/") for place in written)
    assert "/runs/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
