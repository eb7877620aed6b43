"""What lies beside the weights: chosen by name, fetched from the hub where the base is there, its config adjusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from deltaspec.io.companions import adjust_config, is_companion, output_name
from tests.io.files import write_checkpoint, write_config
from tests.io.test_hub import COMMIT, Hub

SCRIPT = """
import json, sys
from deltaspec.io.companions import find_companions
from deltaspec.io.open import open_plain
files, note = find_companions(open_plain(sys.argv[1]))
print(json.dumps([sorted(file.name for file in files), note]))
"""


def found(ref, home, endpoint, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    fixed = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ref],
        env={**clean, **fixed, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_tokenizer_of_a_model_of_the_hub_comes_along(tmp_path):
    server = Hub(tmp_path / "remote")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        model = write_checkpoint(server.root / "owner" / "name", {"a": torch.eye(2)})
        write_config(model, model_type="llama")
        write_checkpoint(model, {"other": torch.eye(9)}, "pickled")
        for name in ("tokenizer.json", "onnx/tokenizer.json", ".gitattributes", "flax_model.msgpack"):
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_text(name)
        home = tmp_path / "home"
        assert found(f"owner/name@{COMMIT}", home, server.endpoint) == [["config.json", "tokenizer.json"], ""]
        assert not any("pytorch_model" in path or "onnx" in path or "flax" in path for path in server.asked)
        names, note = found(f"owner/name@{COMMIT}", home, server.endpoint, HF_HUB_OFFLINE="1")
        assert names == ["config.json", "tokenizer.json"]
        assert "HF_HUB_OFFLINE" in note
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("name", "kept"), [
    ("tokenizer.model", True), ("vocab.json", True), ("README.md", True), ("modeling_x.py", True),
    ("model.safetensors", False), ("Model.GGUF", False), ("training_args.bin", False), ("rng_state.pth", False),
    ("model.safetensors.index.json", False), ("model.safetensors.index.fp16.json", False),
    ("tf_model.h5", False), (".cache", False), ("a/b.txt", False),
    ("..", False),
])  # fmt: skip
def test_which_names_are_companions(name, kept):
    assert is_companion(name) == kept


@pytest.mark.parametrize(("name", "wanted"), [
    ("pytorch_model.bin", "model.safetensors"),
    ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
    ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    ("deep/pytorch_model.fp16.bin", "deep/model.safetensors"),
    ("last.pt", "last.safetensors"),
    ("consolidated.00.pth", "consolidated.00.safetensors"),
    ("model.fp16.safetensors", "model.safetensors"),
    ("model-00001-of-00002.fp16.safetensors", "model-00001-of-00002.safetensors"),
    ("mine.fp16.safetensors", "mine.fp16.safetensors"),
])  # fmt: skip
def test_what_a_weight_file_becomes(name, wanted):
    assert output_name(name) == wanted


def test_a_config_that_fits_is_left_alone_and_the_given_one_is_never_changed():
    config = {"vocab_size": 5, "text_config": {"vocab_size": 7, "dtype": "float32"}, "quantization_config": {"a": 1}}
    before = json.dumps(config)
    assert adjust_config(config, dtype="auto", vocabulary=None, untied=False) is None
    changed = adjust_config(config, dtype="fp16", vocabulary=(7, 9), untied=True)
    assert changed == {
        "vocab_size": 5,
        "text_config": {"vocab_size": 9, "dtype": "float16"},
        "tie_word_embeddings": False,
    }
    assert json.dumps(config) == before
