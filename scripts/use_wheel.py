"""Use an installed deltaspec as a stranger would, outside of its source tree; scripts/test_wheel.sh calls it.

python -I use_wheel.py WHEEL SDIST PYPROJECT
"""

import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

SHIPPED = (
    "py.typed",
    "architecture/patterns.toml",
    "manual/numbers.md",
    "manual/reference-commands.md",
    "store/format.md",
)
DISTRIBUTED = (
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "tests/test_documents.py",
    "scripts/test.sh",
    "figures/energy.csv",
)


def check(condition: object, what: str) -> None:
    """End with a sentence where something is not as it should be."""
    if not condition:
        sys.exit(f"The wheel is not right: {what}.")


def call(*words: str) -> str:
    """Run the installed command and return what it printed."""
    command = Path(sys.executable).with_name("deltaspec")
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"'deltaspec {' '.join(words)}' ended with {done.returncode}: {done.stderr}")
    return done.stdout


def check_files(wheel: str, sdist: str, source: Path) -> None:
    """Everything that is no code and is needed is in the wheel, and what is needed to test it in the sdist."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    kinds = ("**/*.py", "**/*.md", "**/*.toml", "**/*.mplstyle", "py.typed")
    wanted = {f"deltaspec/{path.relative_to(source)}" for kind in kinds for path in source.glob(kind)}
    check(wanted <= held, f"it lacks {sorted(wanted - held)[:5]}")
    check(not any(name.startswith(("tests/", "scripts/")) for name in held), "it holds tests or scripts")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    check(set(DISTRIBUTED) <= inside, f"the sdist lacks {sorted(set(DISTRIBUTED) - inside)}")


def check_analysis() -> None:
    """Analyse a planted change of rank 2."""
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = {name: torch.randn(24, 16)}
    tuned = {name: base[name] + 0.01 * torch.randn(24, 2) @ torch.randn(2, 16)}
    save_file(base, "base.safetensors")
    save_file(tuned, "tuned.safetensors")
    call("analyze", "base.safetensors", "tuned.safetensors", "-o", "run", "--quiet")
    (row,) = json.loads(call("export", "run", "--format", "json"))
    check(row["rank_above_rounding"] == 2, f"a change of rank 2 has rank {row['rank_above_rounding']}")
    call("plot", "run", "--format", "png")


def main() -> None:
    """Check files, version, manual and an analysis."""
    wheel, sdist, project = sys.argv[1:]
    version = tomllib.loads(Path(project).read_text(encoding="utf-8"))["project"]["version"]
    place = Path(str(files("deltaspec")))
    check(not place.is_relative_to(Path(project).parent / "deltaspec"), f"{place} is the source tree")
    check(all((place / name).is_file() for name in SHIPPED), f"{place} lacks one of {', '.join(SHIPPED)}")
    check_files(wheel, sdist, Path(project).parent / "deltaspec")
    said = call("--version").strip()
    check(said == f"deltaspec, version {version}", f"it says '{said}', expected version {version}")
    check(call("help", "numbers").startswith("# Numbers"), "the manual is not there")
    check_analysis()
    print(f"{Path(wheel).name}: installed and used.")


if __name__ == "__main__":
    main()
