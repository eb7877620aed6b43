"""Adapters that are no plain LoRA, and files that belong beside a model: named. What is plain LoRA is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deltaspec
from deltaspec.errors import CheckpointError, DeltaspecError
from deltaspec.io.foreign_marks import FACTORS, MODULES, describe_factor
from deltaspec.io.open import open_plain
from deltaspec.types import Checkpoint
from tests.families import FAMILIES, random_state, write
from tests.field.test_adapter_files import BASE, FACTORS_OF_Q, A, B, Q, adapter
from tests.io.files import refusal

PLAIN = {"lora_unet_mid.lora_down.weight": A, "lora_unet_mid.lora_up.weight": B}
MARKED = {
    "lora_unet_mid.hada_w1_a": "LoHa",
    "lycoris_mid.hada_t1": "LoHa",
    "base_model.model.q.hada_w2_b": "LoHa",
    "lora_unet_mid.lokr_w1": "LoKr",
    "lycoris_mid.lokr_w2_a": "LoKr",
    "diffusion_model.mid.lokr_t2": "LoKr",
    "lora_unet_mid.oft_blocks": "OFT",
    "base_model.model.q.oft_R.weight": "OFT",
    "base_model.model.q.boft_R": "BOFT",
    "lora_te_mid.a1.weight": "GLoRA",
    "base_model.model.q.glora_A": "GLoRA",
    "base_model.model.q.ia3_l": "IA³",
    "lora_unet_mid.on_input": "IA³",
    "lora_controlnet": "Control-LoRA",
    "lora_unet_mid.diff": "full difference",
    "diffusion_model.blocks.0.mid.diff_b": "full difference",
    "lora_unet_norm.w_norm": "difference of norms",
    "lora_unet_norm.b_norm": "difference of norms",
    "lora_unet_mid.dora_scale": "DoRA",
    "lora_unet_mid.lora_mid.weight": "Tucker",
    "lora_unet_mid.q_layer.weight": "T-LoRA",
    "down_blocks.0.motion_modules.0.processor.to_q_lora.down.weight": "AnimateDiff motion LoRA",
    "unet.mid.attn1.processor.to_q_lora.up.weight": "attention processors",
    "base_model.model.q.lora_E": "AdaLoRA",
    "base_model.model.q.vera_lambda_d": "VeRA",
    "base_model.model.q.hra_u": "HRA",
    "base_model.model.q.fourierft_spectrum": "FourierFT",
}


@pytest.mark.parametrize("beside", [{}, PLAIN])
@pytest.mark.parametrize("name", MARKED)
def test_a_file_is_refused_by_the_name_of_what_it_holds(name, beside, tmp_path):
    save_file({"a.first": torch.ones(3), **beside, name: torch.ones(2, 2)}, tmp_path / "style.safetensors")
    said = refusal(tmp_path / "style.safetensors")
    assert MARKED[name] in said
    assert f"'{name}'" in said
    assert "merge it into its base" in said


PEFTS = {
    "LoHaConfig": "LoHa", "LoKrConfig": "LoKr", "OFTConfig": "OFT", "BOFTConfig": "BOFT", "IA3Config": "IA³",
    "AdaLoraConfig": "AdaLoRA", "VeraConfig": "VeRA", "VBLoRAConfig": "VB-LoRA", "FourierFTConfig": "FourierFT",
    "WaveFTConfig": "WaveFT", "HRAConfig": "HRA", "RandLoraConfig": "RandLoRA", "C3AConfig": "C³A",
    "ShiraConfig": "SHiRA", "MissConfig": "MiSS", "RoadConfig": "RoAd", "GraloraConfig": "GraLoRA",
    "DeloraConfig": "DeLoRA", "TrainableTokensConfig": "trained tokens", "LNTuningConfig": "another method",
    "GloraConfig": "GLoRA",
}  # fmt: skip
NEEDS: dict[str, dict[str, object]] = {
    "OFTConfig": {"oft_block_size": 4, "r": 0}, "BOFTConfig": {"boft_block_size": 4}, "C3AConfig": {"block_size": 4},
    "AdaLoraConfig": {"total_step": 10}, "VBLoRAConfig": {"num_vectors": 8, "vector_length": 4},
    "FourierFTConfig": {"n_frequency": 8}, "WaveFTConfig": {"n_frequency": 8}, "RoadConfig": {"group_size": 4},
    "TrainableTokensConfig": {"target_modules": ["emb"], "token_indices": [1]},
    "LNTuningConfig": {"target_modules": ["norm"]},
    "IA3Config": {"feedforward_modules": []},
    **{kind: {"r": 4} for kind in ("RandLoraConfig", "GraloraConfig", "MissConfig", "ShiraConfig")},
}  # fmt: skip


class Model(nn.Module):
    """Something that PEFT can put an adapter on."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.norm = nn.Embedding(8, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.config = {"model_type": "x"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFTS)
def test_what_peft_saves_is_named_without_its_config(kind, tmp_path):
    import peft

    options = {"target_modules": ["lin"], **NEEDS.get(kind, {})}
    peft.get_peft_model(Model(), getattr(peft, kind)(**options)).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    assert PEFTS[kind] in refusal(tmp_path / "a")


def test_every_mark_is_tried():
    named = {describe_factor(name) for name in MARKED}
    assert all(what in named or any(word in what for word in PEFTS.values()) for what in FACTORS)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_model_is_taken_for_one(family, tmp_path):
    folder = write(tmp_path / family, random_state(FAMILIES[family]), FAMILIES[family].config)
    assert isinstance(open_plain(folder), Checkpoint)


BESIDE = {
    "textual inversion": {"emb_params": A},
    "inversion": {"clip_l": A, "clip_g": B},
    "a textual": {"<cat-toy>": A},
    "IP-Adapter": {"image_proj.proj.weight": A, "ip_adapter.1.to_k_ip.weight": A},
    "AnimateDiff motion module": {"down_blocks.0.motion_modules.0.proj_in.weight": A},
    "ControlNet": {"control_model.zero_convs.0.weight": A},
    "virtual tokens": {"prompt_embeddings": A},
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_works_beside_a_model_is_no_full_checkpoint(what, tmp_path):
    file = tmp_path / "extra.safetensors"
    save_file({name: tensor.clone() for name, tensor in BESIDE[what].items()}, file)
    base = write(tmp_path / "base", {"layers.0.q_proj.weight": torch.eye(4)}, {})
    for command in (
        lambda: deltaspec.merge(base, [file], tmp_path / "out"),
        lambda: deltaspec.combine([(file, 1.0), (file, 1.0)], tmp_path / "out"),
        lambda: deltaspec.verify(base, base, file),
        lambda: deltaspec.analyze(base, file, tmp_path / "run"),
        lambda: deltaspec.extract(base, file, tmp_path / "out"),
    ):
        with pytest.raises(DeltaspecError, match=f"{what}.*use it with the tool it is from"):
            command()
    assert deltaspec.analyze(file, file, tmp_path / "alike").path.is_dir()  # two of a kind can be compared


@pytest.mark.parametrize(("content", "what"), [
    ({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": A}, "name": "cat"}, "textual inversion"),
    ({"image_proj": {"proj.weight": A}, "ip_adapter": {"1.to_k_ip.weight": A}}, "IP-Adapter"),
    ({768: [{"linear.0.weight": A}, {"linear.0.weight": A}], 320: [{"linear.0.weight": A}], "step": 1}, "hypernetwork"),
])  # fmt: skip
def test_pickled_ones_are_named_by_their_keys(content, what, tmp_path):
    torch.save(content, tmp_path / "extra.pt")
    assert what in refusal(tmp_path / "extra.pt")


def test_every_module_is_tried():
    assert len(MODULES) == 6


def test_alora_is_read_and_nothing_else(tmp_path):
    folder = adapter(tmp_path / "a", FACTORS_OF_Q, alora_invocation_tokens=[5, 6])
    base = write(tmp_path / "base", BASE, {})
    for command in (
        lambda: deltaspec.merge(base, [folder], tmp_path / "out"),
        lambda: deltaspec.combine([(folder, 1.0)], tmp_path / "out"),  # which resize is of one adapter
        lambda: deltaspec.verify(base, base, folder),
        lambda: deltaspec.extract(base, folder, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"aLoRA.*neither merged"):
            command()
    run = deltaspec.analyze(base, folder, tmp_path / "run")
    assert run.records[0].metrics["frobenius_norm"] == pytest.approx(
        np.linalg.norm(2 * B.numpy() @ A.numpy()), rel=1e-12
    )
    assert any("aLoRA" in str(note) for note in run.manifest["notes"])


@pytest.mark.parametrize(("option", "what"), [
    ({"arrow_config": {"top_k": 2}}, "Arrow"),
    ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
    ({"peft_type": "LOHA"}, "LOHA"),
])  # fmt: skip
def test_other_kinds_of_peft_are_named_by_their_config(option, what, tmp_path):
    assert what in refusal(adapter(tmp_path / "a", FACTORS_OF_Q, **option))


def test_factors_of_another_kind_under_a_config_of_lora(tmp_path):
    assert "LoHa" in refusal(adapter(tmp_path / "a", {**FACTORS_OF_Q, f"{Q}.hada_w1_a": A}))
