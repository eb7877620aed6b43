"""Write the archive of the current format version; run once for each version, never again for an old one.

    .venv-test/bin/python -m tests.archives.make

Expected values are NumPy's, float64, from the matrices before they were stored.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import deltaspec
from deltaspec.store.run import VERSION
from tests.families import write


def main() -> None:
    folder = Path(__file__).parent / f"v{VERSION}"
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    base = {name: torch.randn(8, 6, generator=generator) for name in names}
    tuned = {name: t + 0.1 * torch.randn(8, 6, generator=generator) for name, t in base.items()}
    base["model.norm.weight"], tuned["model.norm.weight"] = torch.ones(6), torch.full((6,), 1.5)
    with tempfile.TemporaryDirectory() as scratch:
        sides = [str(write(Path(scratch) / side, state, {})) for side, state in (("base", base), ("tuned", tuned))]
        options = deltaspec.AnalyzeOptions(device="cpu", vectors=2, spectra=("delta", "base"))
        run = deltaspec.analyze(*sides, folder / "run", options=options)
        manifest = run.path / "manifest.json"
        content = {**json.loads(manifest.read_text().replace(scratch, "archive")), "machine": {}}
        manifest.write_text(json.dumps(content, indent=1))
    expected = {}
    for name in names:
        for key, matrix in ((name, tuned[name].double() - base[name].double()), (f"{name}#base", base[name].double())):
            expected[key] = np.linalg.svd(matrix.numpy(), compute_uv=False).tolist()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
