"""A merge that dequantises leaves nothing behind that says its numbers are quantised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.errors import CheckpointError
from deltaspec.options import MergeOptions
from tests.field.test_scales import COMPANIONS, CONFIG, FP8, MODULE, NAME, quantise, written


def adapter(folder: Path, d_out: int, d_in: int) -> tuple[Path, np.ndarray]:
    generator = torch.Generator().manual_seed(7)
    down, up = (torch.randn(*shape, generator=generator) * 0.01 for shape in ((2, d_in), (d_out, 2)))
    folder.mkdir()
    keys = {f"base_model.model.{MODULE}.lora_{side}.weight": factor for side, factor in (("A", down), ("B", up))}
    save_file(keys, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder, up.double().numpy() @ down.double().numpy()


@pytest.mark.parametrize("companion", COMPANIONS)
def test_a_merge_leaves_nothing_of_the_quantisation(companion, tmp_path):
    stored, scale, real = quantise((2, 3), (128, 128))
    bias, kernel = torch.tensor([448.0, 224.0]).to(FP8), torch.full((4, 2, 3, 3), 448.0).to(FP8)
    tensors = {
        NAME: stored, companion: scale, "scaled_fp8": torch.zeros(2).to(FP8), f"{MODULE}.scale_input": torch.ones(1),
        "head.weight": bias, "head.scale": torch.tensor(0.25), "conv.weight": kernel,
        "conv.scale": torch.full((4,), 0.5),
    }  # fmt: skip
    told = {"_quantization_metadata": "{}", "author": "someone"}
    base = written(tmp_path / "base", tensors, told, **CONFIG, thinker={"text_config": CONFIG})
    for name in ("hf_quant_config.json", "quantize_config.json"):
        (base / name).write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    given, change = adapter(tmp_path / "adapter", 256, 320)
    with pytest.raises(CheckpointError, match="pass --dtype bf16"):
        deltaspec.merge(base, [given], tmp_path / "never")
    deltaspec.merge(base, [given], tmp_path / "out", options=MergeOptions(dtype="fp32"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {NAME, "head.weight", "conv.weight"}
    assert np.array_equal(found[NAME].numpy(), (real + change).astype(np.float32))
    assert found["head.weight"].tolist() == [112.0, 56.0]
    assert found["conv.weight"].unique().tolist() == [224.0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "deltaspec.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"thinker": {"text_config": {}}}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"author": "someone"}


def test_what_says_how_a_base_was_made_stays_where_its_numbers_do(tmp_path):
    base = written(tmp_path / "base", {NAME: torch.zeros(8, 6)}, quantization_config={"quant_method": "fp8"})
    (base / "hf_quant_config.json").write_text("{}")
    deltaspec.merge(base, [adapter(tmp_path / "adapter", 8, 6)[0]], tmp_path / "out")
    assert (tmp_path / "out" / "hf_quant_config.json").is_file()
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
