"""Write the archive of an adapter with its deltaspec.json; run once for each version of it, never again for an old one.

    .venv-test/bin/python -m tests.archives.make_adapter

Expected errors are NumPy's, float64, from the factors as stored.
"""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from deltaspec.options import AnalyzeOptions, ExtractOptions, FormOptions, RankOptions
from deltaspec.workflows.extraction.certificate import VERSION
from deltaspec.workflows.extraction.extract import extract
from tests.families import write


def main() -> None:
    folder = Path(__file__).parent / "adapter" / f"v{VERSION}"
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{depth}.self_attn.q_proj" for depth in (0, 1)]
    base, tuned = {}, {}
    for name in names:
        base[f"{name}.weight"], base[f"{name}.bias"] = torch.randn(8, 6, generator=generator), torch.zeros(8)
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + 0.1 * torch.randn(8, 6, generator=generator)
        tuned[f"{name}.bias"] = 0.1 * torch.randn(8, generator=generator)
    base["model.norm.weight"], tuned["model.norm.weight"] = torch.ones(6), torch.full((6,), 1.5)
    for side, state in (("base", base), ("tuned", tuned)):
        write(folder / side, state, {})
    options = ExtractOptions(RankOptions(amounts=(2,)), FormOptions("bf16", extras="all"), AnalyzeOptions(device="cpu"))
    with chdir(folder):  # so that what it names is named as it will be found
        extract("base", "tuned", "adapter", options=options)
    config = folder / "adapter" / "adapter_config.json"
    content = {**json.loads(config.read_text()), "base_model_name_or_path": "base"}
    config.write_text(json.dumps(content, indent=2))
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    errors = {}
    for name in names:
        lora_A, lora_B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double().numpy() for x in "AB")
        delta = tuned[f"{name}.weight"].double().numpy() - base[f"{name}.weight"].double().numpy()
        errors[f"{name}.weight"] = float(np.linalg.norm(delta - lora_B @ lora_A) / np.linalg.norm(delta))
    (folder / "expected.json").write_text(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
