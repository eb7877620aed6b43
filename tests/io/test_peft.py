"""PEFT folders written by hand from the format's description, against a dense product in NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltaspec.errors import CheckpointError
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.matrix import read_low_rank, read_tensor
from deltaspec.io.open import open_plain, open_source
from deltaspec.types import AdapterIndex, ForeignAdapter, LowRankSource, View

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], *, pickled: bool = False, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    if pickled:
        torch.save(named, folder / "adapter_model.bin")
    else:
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def factors(module: str, *, d_out: int = 5, d_in: int = 4, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.lora_A.weight": torch.randn(r, d_in, generator=generator),
        f"{module}.lora_B.weight": torch.randn(d_out, r, generator=generator),
    }


def opened(folder: Path) -> AdapterIndex:
    source = open_plain(folder)
    assert isinstance(source, AdapterIndex)
    return source


def product(adapter: AdapterIndex, module: str, view: View) -> np.ndarray:
    delta = read_low_rank(LowRankSource((adapter.modules[module],), view))
    assert delta.lora_A.dtype == delta.lora_B.dtype == torch.float64
    return (delta.lora_B @ delta.lora_A).numpy()


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(tmp_path: Path, dtype: torch.dtype, pickled: bool) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in factors("model.layers.0.q_proj").items()}
    adapter = opened(write_adapter(tmp_path, tensors, pickled=pickled))
    lora_A, lora_B = (tensor.double().numpy() for tensor in tensors.values())
    found = product(adapter, "model.layers.0.q_proj", View((5, 4)))
    assert np.allclose(found, 3 * lora_B @ lora_A, rtol=1e-14, atol=0)
    assert adapter.base_model == "owner/base"
    assert opened(next(tmp_path.glob("adapter_model.*"))).modules == adapter.modules


def test_scaling_by_rank_and_alpha_patterns(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"layers.0.q": 3, r"layers\.\d\.v": 1, "k": 4},
        "alpha_pattern": {"q": 5, "ayers.1.k": 99},
    }
    ranks = {"m.layers.0.q": 3, "m.layers.1.q": 2, "m.layers.0.v": 1, "m.layers.1.k": 4, "m.layers.1.kk": 2}
    alphas = {"m.layers.0.q": 5, "m.layers.1.q": 5}
    tensors = {key: value for name, r in ranks.items() for key, value in factors(name, r=r).items()}
    adapter = opened(write_adapter(tmp_path, tensors, **patterns))
    assert {name: term.scaling for name, term in adapter.modules.items()} == {
        name: alphas.get(name, 6) / r for name, r in ranks.items()
    }
    stabilised = opened(write_adapter(tmp_path, tensors, use_rslora=True, **patterns))
    assert {name: term.scaling for name, term in stabilised.modules.items()} == {
        name: alphas.get(name, 6) / math.sqrt(r) for name, r in ranks.items()
    }


def test_embedding(tmp_path: Path) -> None:
    tensors = {"embed.lora_embedding_A": torch.randn(2, 9), "embed.lora_embedding_B": torch.randn(4, 2)}
    adapter = opened(write_adapter(tmp_path, tensors))
    lora_A, lora_B = (tensor.double().numpy() for tensor in tensors.values())
    assert np.allclose(product(adapter, "embed", View((9, 4))), 3 * (lora_B @ lora_A).T, rtol=1e-14, atol=0)


def test_convolution(tmp_path: Path) -> None:
    tensors = {"conv.lora_A.weight": torch.randn(2, 3, 3, 3), "conv.lora_B.weight": torch.randn(7, 2, 1, 1)}
    adapter = opened(write_adapter(tmp_path, tensors))
    lora_A, lora_B = (tensor.double().numpy() for tensor in tensors.values())
    kernel = 3 * np.einsum("or,rikl->oikl", lora_B[:, :, 0, 0], lora_A)
    assert np.allclose(product(adapter, "conv", View((7, 27))), kernel.reshape(7, 27), rtol=1e-12, atol=1e-15)


def test_rows_of_a_fused_module(tmp_path: Path) -> None:
    adapter = opened(write_adapter(tmp_path, factors("qkv", d_out=12)))
    whole = product(adapter, "qkv", View((12, 4)))
    assert np.array_equal(product(adapter, "qkv", View((4, 4), start=4, stop=8)), whole[4:8])
    interleaved = product(adapter, "qkv", View((4, 4), groups=2, start=2, stop=4, transposed=True))
    assert np.array_equal(interleaved, whole[[2, 3, 8, 9]])


def test_terms_are_summed_by_concatenation(tmp_path: Path) -> None:
    adapter = opened(write_adapter(tmp_path, {**factors("a", r=2), **factors("bb", r=3)}, rank_pattern={"bb": 3}))
    delta = read_low_rank(LowRankSource((adapter.modules["a"], adapter.modules["bb"]), View((5, 4))))
    assert (delta.lora_B.shape, delta.lora_A.shape) == ((5, 5), (5, 4))
    wanted = product(adapter, "a", View((5, 4))) + product(adapter, "bb", View((5, 4)))
    assert np.allclose((delta.lora_B @ delta.lora_A).numpy(), wanted, rtol=1e-13, atol=1e-15)
    nothing = read_low_rank(LowRankSource((), View((5, 4))))
    assert (nothing.lora_B.shape, nothing.lora_A.shape) == ((5, 0), (0, 4))


def test_biases_and_whole_tensors(tmp_path: Path) -> None:
    whole = {
        "lm_head.weight": torch.randn(6, 4),
        "classifier.modules_to_save.default.dense.weight": torch.randn(3, 3),
        "score.modules_to_save.weight": torch.randn(2, 3),
        "embed.base_layer.weight": torch.randn(6, 4),
    }
    bias = torch.randn(5)
    adapter = opened(write_adapter(tmp_path, {**factors("q"), "q.lora_B.bias": bias, **whole}, lora_bias=True))
    assert set(adapter.modules) == {"q"}
    assert torch.equal(read_tensor(adapter.biases["q"]), bias)
    names = ("lm_head.weight", "classifier.dense.weight", "score.weight", "embed.weight")
    assert set(adapter.full) == set(names)
    for name, tensor in zip(names, whole.values(), strict=True):
        assert torch.equal(read_tensor(adapter.full[name]), tensor)


def test_adapter_names_inside_keys(tmp_path: Path) -> None:
    tensors = {key.replace(".weight", ".default.weight"): value for key, value in factors("q").items()}
    tensors |= {"e.lora_embedding_A.default": torch.ones(2, 9), "e.lora_embedding_B.default": torch.ones(4, 2)}
    assert set(opened(write_adapter(tmp_path, tensors)).modules) == {"q", "e"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "VERA"}, "VERA adapter"),
        ({"peft_type": "LOHA"}, "LOHA adapter"),
        ({"peft_type": None}, "unknown type"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "started from pissa"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "DELTASPEC_TIED"}, "DELTASPEC_TIED adapter"),
    ],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json'.*{words}.*analyze.*--save full"):
        opened(write_adapter(tmp_path, factors("q"), **config))


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "DELTASPEC_SERIES"])
def test_methods_without_weights_are_not_told_to_merge(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"a {kind} adapter, which changes no weights\.$"):
        opened(write_adapter(tmp_path, factors("q"), peft_type=kind))


def test_magnitudes_are_refused_whatever_the_config_says(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="DoRA"):
        opened(write_adapter(tmp_path, {**factors("q"), "q.lora_magnitude_vector": torch.ones(5)}))


@pytest.mark.parametrize("config", [{"peft_type": "VERA"}, {"use_dora": True}, {"peft_type": "PREFIX_TUNING"}])
def test_what_is_not_plain_lora_opens_as_what_it_is(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path, factors("q"), **config)
    found = open_source(folder)
    assert isinstance(found, ForeignAdapter)
    assert (found.ref, found.root, found.config["peft_type"]) == (str(folder), folder, config.get("peft_type", "LORA"))
    assert [file.name for file in found.files] == ["adapter_model.safetensors"]
    with pytest.raises(CheckpointError) as caught:
        open_plain(folder)
    assert str(caught.value) == found.refusal
    assert fingerprint(found).keys() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("option", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [0, -1, None, "8", True, float("nan"), float("inf"), [2]])
def test_numbers_that_make_no_sense(tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json'.*positive number as {option} of 'q'"):
        opened(write_adapter(tmp_path, factors("q"), **{option: value}))


@pytest.mark.parametrize("patterns", [{"rank_pattern": {"(": 2}}, {"alpha_pattern": [1]}, {"rank_pattern": 3}])
def test_patterns_that_make_no_sense(tmp_path: Path, patterns: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json'.*_pattern"):
        opened(write_adapter(tmp_path, factors("q"), **patterns))


def test_a_rank_that_the_factors_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'q'.*rank 8.*has 2"):
        opened(write_adapter(tmp_path, factors("q"), r=8))


@pytest.mark.parametrize(
    "tensors",
    [
        {"q.lora_A.weight": torch.ones(2, 4)},
        {"q.lora_B.weight": torch.ones(5, 2)},
        {"q.lora_A.weight": torch.ones(2, 4), "q.lora_embedding_B": torch.ones(5, 2)},
        {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(5, 3)},
        {"q.lora_A.weight": torch.ones(2), "q.lora_B.weight": torch.ones(5, 2)},
        {"q.lora_A.weight": torch.ones(0, 4), "q.lora_B.weight": torch.ones(5, 0)},
        {"q.lora_A.weight": torch.ones(2, 4, 3, 3), "q.lora_B.weight": torch.ones(5, 2, 3, 3)},
        {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(5, 2), "q.lora_C.weight": torch.ones(2)},
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"q.*adapter_model\.safetensors"):
        opened(write_adapter(tmp_path, tensors))


def test_a_product_that_does_not_fit_the_base(tmp_path: Path) -> None:
    adapter = opened(write_adapter(tmp_path, factors("q")))
    for view in (View((5, 3)), View((6, 4)), View((2, 4), groups=2, start=0, stop=1)):
        with pytest.raises(CheckpointError, match=r"'base_model\.model\.q\.lora_B\.weight'.*adapter_model"):
            product(adapter, "q", view)


def test_folders_without_weights_or_config(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, factors("q"))
    (folder / "adapter_config.json").rename(folder / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"LoRA factor without 'adapter_config\.json'"):
        open_plain(folder)
    (folder / "elsewhere.json").rename(folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").unlink()
    for path in (folder, folder / "adapter_config.json"):
        with pytest.raises(CheckpointError, match=r"none of adapter_model\.safetensors"):
            open_plain(path)


@pytest.mark.parametrize("name", ["blocks.0.lora_down.weight", "unet.to_q.lora.down.weight", "lora_A.weight"])
def test_lora_files_of_other_tools(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(2, 3)}, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match="LoRA factor without"):
        open_plain(tmp_path / "style.safetensors")


def test_an_empty_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no LoRA factors"):
        opened(write_adapter(tmp_path, {}))


def test_the_fingerprint_covers_the_config(tmp_path: Path) -> None:
    first = fingerprint(opened(write_adapter(tmp_path, factors("q"))))
    second = fingerprint(opened(write_adapter(tmp_path, factors("q"), lora_alpha=7)))
    assert first.keys() == second.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    assert {name for name in first if first[name] != second[name]} == {"adapter_config.json"}


def test_a_bias_without_factors_is_named(tmp_path: Path) -> None:
    tensors = {**factors("m.q"), "m.v.lora_B.bias": torch.ones(5)}
    with pytest.raises(CheckpointError, match=r"'base_model.model.m.v.lora_B.bias' in .*adapter_model.safetensors"):
        opened(write_adapter(tmp_path, tensors, lora_bias=True))
    tensors |= factors("m.v")
    assert opened(write_adapter(tmp_path, tensors, lora_bias=True)).biases.keys() == {"m.v"}
