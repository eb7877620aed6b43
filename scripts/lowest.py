"""Print the lowest version of everything that pyproject.toml declares, as constraints for test.sh --lowest."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_lowest() -> dict[str, str]:
    """Return the lowest version by package, of dependencies, extras and the build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    groups = [content["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    found: dict[str, str] = {}
    for requirement in (one for group in groups for one in group):
        if requirement.startswith(f"{project['name']}["):  # an extra that takes in others
            continue
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,[^;]+)?", requirement)
        if match is None:
            message = f"pyproject.toml declares '{requirement}': expected name>=version, whose lowest can be tried."
            raise SystemExit(message)
        name, version = match[1], match[2]
        if found.setdefault(name, version) != version:
            message = f"pyproject.toml declares {name} from {found[name]} and from {version}: expected one of them."
            raise SystemExit(message)
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in read_lowest().items()))
