"""Factors of stacked experts: each expert of the base gets its own, however the base stores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import deltaspec
from deltaspec.errors import CheckpointError, PairingError
from deltaspec.io.open import open_plain
from tests.families import FAMILIES, random_state, write

EXPERTS = "model.layers.0.mlp.experts"
OPTIONS = deltaspec.AnalyzeOptions(device="cpu")


def adapter(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """Fold (experts, r, d_in) and (experts, d_out, r) as PEFT's target_parameters are, gate_up_proj innermost."""
    folder.mkdir()
    state = {}
    for name, (a, b) in factors.items():
        module, _, leaf = name.rpartition(".")
        path = f"base_model.model.{module}" + (".base_layer" if leaf == "gate_up_proj" and len(factors) > 1 else "")
        state[f"{path}.lora_A.weight"] = torch.cat(list(a)).contiguous()
        state[f"{path}.lora_B.weight"] = torch.stack(list(b), dim=-1).flatten(1).contiguous()
    settings = {"peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "lora_alpha": 6, "target_modules": []}
    settings |= {"target_parameters": list(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def stack(d_out: int, d_in: int, *, experts: int = 3, r: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(experts, r, d_in, generator=g), torch.randn(experts, d_out, r, generator=g)


def base(folder: Path, name: str) -> Path:
    return write(folder, random_state(FAMILIES[name]), FAMILIES[name].config)


@pytest.mark.parametrize("name", ["mixtral_stacked", "mixtral"])
def test_each_expert_gets_its_own_rows(name: str, tmp_path: Path) -> None:
    up, down = stack(80, 24), stack(24, 40, seed=1)
    lora = adapter(tmp_path / "lora", {f"{EXPERTS}.gate_up_proj": up, f"{EXPERTS}.down_proj": down})
    run = deltaspec.analyze(base(tmp_path / "base", name), lora, tmp_path / "run", options=OPTIONS)
    assert len(run.records) == 9
    for record in run.records:
        a, b = down if record.key.role == "down_proj" else up
        dense = 3 * b[record.key.expert].double() @ a[record.key.expert].double()
        rows = {"gate_proj": slice(0, 40), "up_proj": slice(40, 80)}.get(record.key.role, slice(None))
        exact = np.linalg.svd(dense[rows].numpy(), compute_uv=False)
        assert np.allclose(run.spectrum(record.store_key).singular_values.numpy(), exact[:2], rtol=1e-10)


def test_two_stacks_of_factors(tmp_path: Path) -> None:
    one, other = stack(24, 40), stack(24, 40, seed=1)
    folders = [adapter(tmp_path / n, {f"{EXPERTS}.down_proj": f}) for n, f in (("a", one), ("b", other))]
    run = deltaspec.analyze(*folders, tmp_path / "run", options=OPTIONS)
    assert [record.key.expert for record in run.records] == [0, 1, 2]
    for record in run.records:
        (a, b), (c, d) = (tuple(f[record.key.expert].double() for f in pair) for pair in (one, other))
        exact = np.linalg.svd((3 * (d @ c - b @ a)).numpy(), compute_uv=False)
        assert np.allclose(run.spectrum(record.store_key).singular_values.numpy()[:4], exact[:4], rtol=1e-9)


@pytest.mark.parametrize("experts", [2, 4])
def test_another_number_of_experts_is_another_base(experts: int, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", {f"{EXPERTS}.down_proj": stack(24, 40, experts=experts)})
    with pytest.raises((PairingError, CheckpointError), match="experts"):
        deltaspec.analyze(base(tmp_path / "b", "mixtral_stacked"), lora, tmp_path / "run", options=OPTIONS)
    with pytest.raises((PairingError, CheckpointError), match="experts"):
        deltaspec.analyze(base(tmp_path / "one", "mixtral"), lora, tmp_path / "other", options=OPTIONS)


@pytest.mark.parametrize("version", ["0.19.0", "0.17.1", None, "unknown"])
def test_older_and_unknown_foldings_are_refused_by_name(version: object, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", {f"{EXPERTS}.down_proj": stack(24, 40)}, peft_version=version)
    with pytest.raises(CheckpointError, match=r"target_parameters of PEFT .*since 0\.19\.1"):
        open_plain(lora)


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0", "0.21.3.dev0@abc", "1.0"])
def test_newer_ones_are_read(version: str, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", {f"{EXPERTS}.down_proj": stack(24, 40)}, peft_version=version)
    term = open_plain(lora).modules[f"{EXPERTS}.down_proj"]  # type: ignore[union-attr]
    assert (term.experts, term.scaling) == (3, 3.0)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (["experts.gate_up_proj", "experts.down_proj", "experts.bias"], "no known order"),
        (["experts.w1", "experts.w2"], "no known order"),
        (["experts.gate_up_proj"], "no known order"),
        (["elsewhere.gate_up_proj"], "no known order"),
        ("experts.gate_up_proj", "no list of names"),
        ([1], "no list of names"),
    ],
)
def test_nests_that_cannot_be_told_apart(listed: object, words: str, tmp_path: Path) -> None:
    factors = {f"{EXPERTS}.gate_up_proj": stack(80, 24), f"{EXPERTS}.down_proj": stack(24, 40)}
    lora = adapter(tmp_path / "lora", factors, target_parameters=listed)
    with pytest.raises(CheckpointError, match=words):
        open_plain(lora)


def test_an_expert_that_a_stack_lacks(tmp_path: Path) -> None:
    from deltaspec.io.matrix import read_low_rank
    from deltaspec.types import LowRankSource, View

    lora = open_plain(adapter(tmp_path / "lora", {f"{EXPERTS}.down_proj": stack(24, 40)}))
    (term,) = lora.modules.values()  # type: ignore[union-attr]
    for expert in (None, 3):
        with pytest.raises(CheckpointError, match=f"3 experts have no expert {expert}"):
            read_low_rank(LowRankSource((term,), View((24, 40), expert=expert)))
