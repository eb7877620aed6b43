"""Adapters for vLLM and llama.cpp: what a server gets wrong is refused or left out, by whichever command writes it."""

from __future__ import annotations

import json
import re
import shlex

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deltaspec.cli.main import cli
from tests.oracle.parity import QUIET
from tests.tiny_models import build, perturb

TARGETS = ("vllm", "llamacpp")
WRITERS = ("extract", "resize", "combine")
pytestmark = QUIET


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def make(folder, name, modules, **config):
    """Write a model, a fine-tune of it, and a PEFT adapter with random factors on the modules."""
    base = build(name)
    base.save_pretrained(folder / "base")
    perturb(build(name)).save_pretrained(folder / "tuned")
    torch.manual_seed(3)
    options = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, init_lora_weights=False, **config)
    wrapped = peft.get_peft_model(base, options)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


def write(folder, writer, *options):
    """Write an adapter by one of the three commands."""
    source = (folder / "base", folder / "tuned") if writer == "extract" else (folder / "adapter",)
    return run(writer, *source, "--rank", 3, "-o", folder / "out", "--quiet", "--json", *options)


def products(folder):
    """Each module's scaling·B·A, as PEFT's files say it."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert not config["rank_pattern"]
    scaling, found = config["lora_alpha"] / config["r"], {}
    for name, lora_A in tensors.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = scaling * tensors[name.replace("lora_A", "lora_B")].double() @ lora_A.double()
    return found


@pytest.mark.parametrize("writer", WRITERS)
def test_a_scale_that_llama_cpp_does_not_know_is_refused(writer, tmp_path):
    folder = make(tmp_path, "llama", ["q_proj", "down_proj"])
    done = write(folder, writer, "--rslora", "--target", "llamacpp")
    assert done.exit_code == 2
    assert done.stderr == (
        "Error: --rslora scales by α/√r, and llama.cpp by α/r: leave it out, the scale is 1 either way.\n"
    )
    assert not (tmp_path / "out").exists()
    assert write(folder, writer, "--target", "llamacpp").exit_code == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"] / config["r"]) == (False, 1)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("target", "then"), [("vllm", "serve the merged model"), ("llamacpp", "convert the merged")])
def test_conv1d_is_refused_with_a_way_out_that_works(writer, target, then, tmp_path):
    folder = make(tmp_path, "gpt2", ["c_attn", "c_proj", "c_fc"])
    done = write(folder, writer, "--target", target)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    for said in ("--target peft", "deltaspec merge", then):
        assert said in done.stderr
    assert not (tmp_path / "out").exists()
    assert write(folder, writer, "--target", "peft").exit_code == 0
    merged = run("merge", folder / "base", folder / "out", "-o", folder / "merged", "--quiet")
    assert merged.exit_code == 0, merged.output
    found, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    name = "transformer.h.0.attn.c_attn"
    stored = next(key for key in base if name.endswith(key.removesuffix(".weight")) and key.endswith("c_attn.weight"))
    change = found[stored].double() - base[stored].double()
    expected = products(folder / "out")[name].T
    torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-6)


def test_conv1d_is_known_from_the_base_where_the_adapter_does_not_say_it(tmp_path):
    folder = make(tmp_path, "gpt2", ["c_attn", "c_fc"])
    file = folder / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": False}))
    done = write(folder, "resize", "--target", "llamacpp", "--base", folder / "base")
    assert done.exit_code == 2
    assert "Conv1D" in done.stderr


@pytest.mark.parametrize("kind", ["gptj", "bloom", "falcon", "stablelm"])
def test_models_of_which_vllm_loads_no_adapter_are_named(kind, tmp_path):
    folder = make(tmp_path, "llama", ["q_proj"])
    for side in ("base", "tuned"):
        file = folder / side / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind}))
    done = write(folder, "extract", "--target", "vllm")
    assert done.exit_code == 2
    assert f"vLLM loads no adapters of the model type {kind}" in done.stderr
    assert write(folder, "resize", "--target", "vllm", "--base", folder / "base").exit_code == 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embeddings_and_heads_stay_outside_and_are_listed_with_their_share(name, writer, target, tmp_path):
    folder = make(tmp_path, name, ["embed_tokens", "q_proj", "down_proj", *(["lm_head"] if name == "llama" else [])])
    done = write(folder, writer, "--target", target)
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout).values()
    blocks = re.compile(r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_[AB]\.weight")
    tensors = load_file(folder / "out/adapter_model.safetensors")
    assert tensors
    assert all(blocks.fullmatch(key) for key in tensors)
    left = {row["tensor"]: row["share"] for row in report["not_carried"]}
    assert left["model.embed_tokens.weight"] > 0
    assert ("lm_head.weight" in left) == (name == "llama")
    if writer != "extract":
        given = load_file(folder / "adapter/adapter_model.safetensors")
        embedding = "base_model.model.model.embed_tokens.lora_embedding_"
        parts = {"model.embed_tokens.weight": 2.0 * (given[f"{embedding}B"] @ given[f"{embedding}A"]).double()}
        if name == "llama":
            parts["lm_head.weight"] = (
                2.0
                * (
                    given["base_model.model.lm_head.lora_B.weight"] @ given["base_model.model.lm_head.lora_A.weight"]
                ).double()
            )
        own = {path: value for path, value in products(folder / "adapter").items() if path.startswith("model.layers")}
        total = sum(float(value.square().sum()) for value in (*parts.values(), *own.values()))
        for tensor, value in parts.items():
            assert left[tensor] == pytest.approx(float(value.square().sum()) / total, rel=1e-5)
        assert report["totals"]["kept"] == pytest.approx(1 - sum(left.values()), rel=1e-5)
        for path, value in products(folder / "out").items():
            torch.testing.assert_close(value, own[path], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("writer", WRITERS)
def test_stacked_experts_stay_outside(writer, target, tmp_path):
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = make(tmp_path, "mixtral", ["q_proj"], target_parameters=stacks)
    done = write(folder, writer, "--target", target)
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout).values()
    config = json.loads((folder / "out/adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert all(path.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for path in config["target_modules"])
    assert any("experts" in row["tensor"] and row["share"] > 0 for row in report["not_carried"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("writer", WRITERS)
def test_fused_layers_of_the_blocks_go_along(writer, target, tmp_path):
    folder = make(tmp_path, "neox", ["query_key_value", "dense_h_to_4h"])
    done = write(folder, writer, "--target", target)
    assert done.exit_code == 0, done.output
    found = {path.rpartition(".")[2] for path in products(folder / "out")}
    assert found >= {"query_key_value", "dense_h_to_4h"}


def test_experts_that_are_modules_go_to_llama_cpp_and_not_to_vllm(tmp_path):
    folder = make(tmp_path, "llama", ["q_proj", "up_proj"])
    file = folder / "adapter/adapter_model.safetensors"
    stored = {key.replace("mlp.up_proj", "mlp.experts.1.up_proj"): value for key, value in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    assert write(folder, "resize", "--target", "llamacpp").exit_code == 0
    assert any("experts.1" in path for path in products(folder / "out"))
    (report,) = json.loads(write(folder, "resize", "--target", "vllm", "--overwrite").stdout).values()
    assert not any("experts" in path for path in products(folder / "out"))
    assert {row["tensor"].split(".")[-2] for row in report["not_carried"]} == {"up_proj"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]])
def test_an_adapter_of_which_nothing_remains_is_refused(modules, target, tmp_path):
    folder = make(tmp_path, "llama", modules)
    done = write(folder, "resize", "--target", target)
    assert done.exit_code == 2
    assert f"'{'model.' if modules == ['embed_tokens'] else ''}{modules[0]}.weight'" in done.stderr
    assert "--target peft" in done.stderr
    assert not (folder / "out").exists()


def test_a_sum_that_is_zero_in_all_that_a_target_takes_is_no_adapter(tmp_path):
    folder = make(tmp_path, "llama", ["embed_tokens", "q_proj"])
    file = folder / "adapter/adapter_model.safetensors"
    stored = {key: 0 * value if "q_proj" in key else value for key, value in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    done = write(folder, "resize", "--target", "vllm")
    assert done.exit_code == 2
    assert "is zero in all that vllm takes" in done.stderr
    assert write(folder, "resize", "--target", "peft").exit_code == 0


def commands(folder):
    block = re.search(r"```sh\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line) for line in block[1].splitlines()]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("rank", "bound"), [(1, 1), (3, 8), (8, 8), (9, 16)])
def test_the_card_for_vllm_has_a_bound_that_vllm_knows(writer, rank, bound, tmp_path):
    folder = make(tmp_path, "llama", ["q_proj", "down_proj"])
    done = write(folder, writer, "--target", "vllm", "--rank", rank)
    assert done.exit_code == 0, done.output
    stored = json.loads((folder / "out/adapter_config.json").read_text())["r"]
    ((*words,),) = commands(folder / "out")
    assert words[:3] == ["vllm", "serve", "path_of_the_base"]
    given = int(words[words.index("--max-lora-rank") + 1])
    assert given >= stored
    assert given in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert given == (bound if stored == rank else 8)
    assert words[-2:] == ["--lora-modules", "mine=path_of_this_folder"]


def test_the_card_for_llama_cpp_has_its_commands(tmp_path):
    folder = make(tmp_path, "llama", ["q_proj"])
    assert write(folder, "extract", "--target", "llamacpp").exit_code == 0
    base, adapter, server = commands(folder / "out")
    assert base[:2] == ["python", "convert_hf_to_gguf.py"]
    assert adapter == shlex.split(
        "python convert_lora_to_gguf.py path_of_this_folder --base path_of_the_base --outfile adapter.gguf"
    )
    assert server == ["llama-server", "-m", base[-1], "--lora", adapter[-1]]


def test_a_rank_above_all_that_vllm_knows_is_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        weight = torch.randn(514, 514, generator=generator)
        tensors = {"model.layers.0.self_attn.q_proj.weight": weight}
        save_file(tensors, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / side / "config.json").write_text('{"model_type": "llama"}')
    done = write(tmp_path, "extract", "--target", "vllm", "--rank", 513)
    assert done.exit_code == 2
    assert done.stderr == "Error: The adapter has rank 513, and vLLM loads at most 512: pass --max-rank 512.\n"
    again = write(tmp_path, "extract", "--target", "vllm", "--rank", 513, "--max-rank", 512)
    assert again.exit_code == 0, again.output
    assert "--max-lora-rank 512" in (tmp_path / "out/README.md").read_text()


def test_a_card_for_peft_says_by_version_who_follows_patterns_and_rslora(tmp_path):
    folder = make(tmp_path, "llama", ["q_proj"])
    done = run("extract", folder / "base", folder / "tuned", "--energy", "0.5", "--rslora", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out/README.md").read_text()
    assert "vLLM from 0.32 on" in card
    assert "use_rslora" in card
    assert "```sh" not in card
