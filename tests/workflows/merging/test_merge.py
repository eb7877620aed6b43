"""Merged checkpoints against NumPy sums and PEFT's own merge, and everything beside the weights."""

from __future__ import annotations

import json
import math
import re
import struct

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.cli.main import cli
from deltaspec.errors import CheckpointError, OptionError, PairingError, RunError
from deltaspec.options import ExtractOptions, FormOptions, MergeOptions, RankOptions
from deltaspec.workflows.extraction.extract import extract
from deltaspec.workflows.merging.merge import merge, parse_adapter
from tests.families import FAMILIES, random_state, write
from tests.pairing.test_adapters import adapter, factors
from tests.workflows.extraction.test_extract import CPU, planted_pair

LLAMA = FAMILIES["llama"]
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def checkpoint(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def whole(folder, tensors):
    """Add tensors that the adapter stores whole, by their names in the base."""
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **{f"base_model.model.{name}": t for name, t in tensors.items()}}, file)
    return folder


def summed(weight, update):
    """The float32 sum, rounded to nearest even in the weight's dtype, from NumPy alone."""
    total = weight.float().numpy() + update.astype(np.float32)
    if weight.dtype == torch.float32:
        return total
    raw = total.view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000).view(np.float32)  # bf16: its upper half


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def state(request):
    return random_state(LLAMA, dtype=request.param)


@pytest.fixture
def base(state, tmp_path):
    return write(tmp_path / "base", state, LLAMA.config, shards=3)


def lora(folder, state, names=(Q, DOWN), *, seed=0, scale=0.05, **config):
    shapes = {name: state[f"{name}.weight"].shape for name in names}
    found = {name: factors(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return adapter(folder, {n: (scale * a, b) for n, (a, b) in found.items()}, **config)


def product(folder, name):
    stored = {n: t.double().numpy() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    return 2 * b @ a  # alpha 8, rank 4


def test_several_adapters_are_one_sum_rounded_once(state, base, tmp_path):
    one, two = lora(tmp_path / "one", state), lora(tmp_path / "two", state, (Q,), seed=7)
    before = {path: path.read_bytes() for folder in (base, one, two) for path in folder.iterdir()}
    report = merge(base, [one, f"{two}:-0.5"], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert found.keys() == state.keys()
    updates = {Q: product(one, Q) - 0.5 * product(two, Q), DOWN: product(one, DOWN)}
    for name, tensor in state.items():
        change = updates.get(name.removesuffix(".weight"))
        assert found[name].dtype == tensor.dtype
        if change is None:
            assert bits(found[name]) == bits(tensor)
        else:
            assert np.array_equal(found[name].float().numpy(), summed(tensor, change))
    for row in report.to_dict()["matrices"]:
        name = row["tensor"].removesuffix(".weight")
        moved = found[row["tensor"]].double().numpy() - state[row["tensor"]].double().numpy()
        lost = np.linalg.norm(moved - updates[name]) / np.linalg.norm(updates[name])
        assert row["relative_loss"] == pytest.approx(lost, rel=1e-6)
        assert row["unchanged_fraction"] == pytest.approx((moved == 0).mean())
    assert {row.key.tensor for row in report.rows} == {f"{Q}.weight", f"{DOWN}.weight"}
    assert {path: path.read_bytes() for folder in (base, one, two) for path in folder.iterdir()} == before


def test_float64_stays_float64(tmp_path):
    state = random_state(LLAMA, dtype=torch.float64)
    base, change = write(tmp_path / "base", state, LLAMA.config), lora(tmp_path / "lora", state, scale=1e-9)
    merge(base, [change], tmp_path / "out")
    found = checkpoint(tmp_path / "out")[f"{Q}.weight"].numpy()
    assert np.allclose(found - state[f"{Q}.weight"].numpy(), product(change, Q), rtol=1e-5, atol=1e-15)


def test_the_merged_checkpoint_analyses_as_the_adapter(tmp_path):
    """At float32, base against merged has the spectra that the factors have."""
    state = random_state(LLAMA)
    base = write(tmp_path / "base", state, LLAMA.config, shards=2)
    change = lora(tmp_path / "lora", state)
    merge(base, [change], tmp_path / "out")
    direct = deltaspec.analyze(base, change, tmp_path / "a")
    through = deltaspec.analyze(base, tmp_path / "out", tmp_path / "b")
    rows = {row["tensor"]: row for row in through.to_dicts()}
    for row in direct.to_dicts():
        assert rows[row["tensor"]]["frobenius_norm"] == pytest.approx(row["frobenius_norm"], rel=1e-5)
        assert rows[row["tensor"]]["effective_rank"] == pytest.approx(row["effective_rank"], rel=1e-2)
        assert rows[row["tensor"]]["rank_above_rounding"] == 4
    assert all(
        row["frobenius_norm"] == 0 for name, row in rows.items() if name.removesuffix(".weight") not in (Q, DOWN)
    )


def test_files_names_and_what_lies_beside_are_kept(state, base, tmp_path):
    names = ["tokenizer.json", "generation_config.json", "modeling_own.py", "merges.txt"]
    for name in names:
        (base / name).write_text(f"content of {name}")
    (base / "nested").mkdir()
    (base / "nested" / "inner.txt").write_text("")
    for name in ("model.gguf", "pytorch_model.bin", "optimizer.pt", "pytorch_model.bin.index.json", ".gitattributes"):
        (base / name).write_text("no")
    (tmp_path / "secret.txt").write_text("elsewhere")
    (base / "link.txt").symlink_to(tmp_path / "secret.txt")
    (base / "vocab.txt").symlink_to("merges.txt")
    merge(base, [lora(tmp_path / "lora", state)], tmp_path / "out")
    out = tmp_path / "out"
    shards = [path.name for path in base.glob("model-*.safetensors")]
    kept = {*names, *shards, "vocab.txt", "config.json", "model.safetensors.index.json", "deltaspec.json"}
    assert {path.name for path in out.iterdir()} == kept
    assert all((out / name).read_text() == f"content of {name}" for name in names)
    assert not (out / "vocab.txt").is_symlink()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    for shard in shards:
        with safe_open(out / shard, framework="pt") as one, safe_open(base / shard, framework="pt") as other:
            assert set(one.keys()) == set(other.keys())
            assert one.metadata() == other.metadata()
    assert not list(tmp_path.glob("*.partial-*"))


def test_links_of_the_hubs_cache_are_followed(state, tmp_path):
    """A snapshot is nothing but links into blobs beside it."""
    real = write(tmp_path / "models--o--n" / "blobs", state, LLAMA.config)
    (real / "tokenizer.json").write_text("{}")
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    merge(snapshot, [lora(tmp_path / "lora", state)], tmp_path / "out")
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("single", [True, False])
def test_pickled_bases_become_safetensors(single, state, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA.config))
    names = list(state)
    if single:
        torch.save({**state, "lm_head.copy": state[names[0]]}, folder / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({n: state[n] for n in names if files[n] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    merge(folder, [lora(tmp_path / "lora", state)], tmp_path / "out")
    stored = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    sharded = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert stored == (["model.safetensors"] if single else sharded)
    found = checkpoint(tmp_path / "out")
    assert found.keys() == state.keys()
    assert np.array_equal(
        found[f"{Q}.weight"].float().numpy(), summed(state[f"{Q}.weight"], product(tmp_path / "lora", Q))
    )
    if single:  # a name that shared memory is said to, as safetensors does
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
            assert file.metadata()["lm_head.copy"] == names[0]


def test_one_file_becomes_one_file(state, tmp_path):
    """A lone file's neighbours belong to other models and are left alone."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    save_file(state, shelf / "style.safetensors", metadata={"modelspec.title": "x"})
    (shelf / "readme.txt").write_text("of another model")
    change = lora(tmp_path / "lora", state)
    report = merge(shelf / "style.safetensors", [change], tmp_path / "out.safetensors")
    assert report.path == tmp_path / "out.safetensors"
    assert load_file(tmp_path / "out.safetensors").keys() == state.keys()
    merge(shelf / "style.safetensors", [change], tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"style.safetensors", "deltaspec.json"}
    base = write(tmp_path / "sharded", state, LLAMA.config, shards=2)
    with pytest.raises(OptionError, match="2 files"):
        merge(base, [change], tmp_path / "other.safetensors")


def test_other_dtypes_and_the_config_that_says_them(tmp_path):
    state = {**random_state(LLAMA), "model.position_ids": torch.arange(7)}
    base = write(
        tmp_path / "base", state, {**LLAMA.config, "torch_dtype": "float32", "text_config": {"dtype": "float32"}}
    )
    change = lora(tmp_path / "lora", state)
    merge(base, [change], tmp_path / "out", options=MergeOptions("bf16"))
    found = checkpoint(tmp_path / "out")
    assert found.pop("model.position_ids").tolist() == list(range(7))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    weight, update = state[f"{Q}.weight"], product(change, Q)
    assert torch.equal(found[f"{Q}.weight"], torch.from_numpy(weight.numpy() + update.astype(np.float32)).bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")


@pytest.fixture
def fp8(tmp_path):
    """Blocks of 4 × 8 with their scales, as DeepSeek stores them; also a stack's, and an activation scale."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(12, 16, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator) + 0.5
    stack = torch.randn(2, 4, 8, generator=generator).to(torch.float8_e4m3fn)
    state = {
        f"{Q}.weight": codes,
        f"{Q}.weight_scale_inv": scale,
        f"{Q}.input_scale": torch.ones(1),
        "model.layers.0.mlp.experts.down_proj": stack,
        "model.layers.0.mlp.experts.down_proj_scale": torch.tensor([0.5, 2.0]).view(2, 1, 1),
        "model.norm.weight": torch.ones(16).bfloat16(),
    }
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    dense = codes.double() * scale.double().repeat_interleave(4, 0).repeat_interleave(8, 1)
    return write(tmp_path / "fp8", state, config), dense, stack.double() * torch.tensor([0.5, 2.0]).view(2, 1, 1)


def test_quantised_bases_are_dequantised_on_request_only(fp8, tmp_path):
    folder, dense, stack = fp8
    change = adapter(tmp_path / "lora", {Q: factors(12, 16)})
    with pytest.raises(CheckpointError, match=r"F8_E4M3 with scales.*--dtype bf16"):
        merge(folder, [change], tmp_path / "out")
    merge(folder, [change], tmp_path / "out", options=MergeOptions("fp32"))
    found = checkpoint(tmp_path / "out")
    assert found.keys() == {f"{Q}.weight", "model.layers.0.mlp.experts.down_proj", "model.norm.weight"}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert np.allclose(found[f"{Q}.weight"].numpy(), dense.numpy() + product(change, Q), rtol=1e-6, atol=1e-6)
    assert np.allclose(found["model.layers.0.mlp.experts.down_proj"].numpy(), stack.numpy(), rtol=1e-7)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def test_whole_tensors_replace_and_count_by_their_weight(tmp_path):
    state = random_state(LLAMA)
    base = write(tmp_path / "base", state, LLAMA.config)
    new = {NORM: state[NORM] + 1, EMBED: state[EMBED] * 2}
    change = whole(lora(tmp_path / "lora", state, (Q,)), new)
    merge(base, [change], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in new.items())
    merge(base, [f"{change}:0.25"], tmp_path / "quarter")
    found = checkpoint(tmp_path / "quarter")
    for name, tensor in new.items():
        wanted = state[name].double() + 0.25 * (tensor.double() - state[name].double())
        assert torch.allclose(found[name].double(), wanted, rtol=0, atol=1e-6)
    other = whole(lora(tmp_path / "other", state, (Q,), seed=4), {NORM: new[NORM]})
    merge(base, [change, other], tmp_path / "both")  # the same values twice are one replacement
    assert torch.equal(checkpoint(tmp_path / "both")[NORM], new[NORM])
    for second in (f"{other}:0.5", whole(lora(tmp_path / "third", state, (Q,)), {NORM: state[NORM]})):
        with pytest.raises(PairingError, match=f"two adapters replace '{NORM}'"):
            merge(base, [change, second], tmp_path / "never")


def test_factors_of_one_adapter_add_to_the_whole_tensor_of_another(tmp_path):
    state = random_state(LLAMA)
    base = write(tmp_path / "base", state, LLAMA.config)
    replaced = whole(lora(tmp_path / "one", state, (DOWN,)), {f"{Q}.weight": state[f"{Q}.weight"] * 3})
    change = lora(tmp_path / "two", state, (Q,), seed=5)
    for number, order in enumerate(([replaced, change], [change, replaced])):
        merge(base, order, tmp_path / f"out{number}")
        found = checkpoint(tmp_path / f"out{number}")[f"{Q}.weight"]
        assert np.array_equal(found.numpy(), summed(3 * state[f"{Q}.weight"], product(change, Q)))


def test_a_grown_vocabulary(tmp_path):
    state = random_state(LLAMA)
    rows = state[EMBED].shape[0]
    config = {**LLAMA.config, "vocab_size": rows}
    base = write(tmp_path / "base", state, config, shards=2)
    grown = {name: torch.cat([state[name] + 1, torch.randn(3, state[name].shape[1])]) for name in (EMBED, HEAD)}
    both = whole(lora(tmp_path / "both", state, (Q,)), grown)
    report = merge(base, [both], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in grown.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows + 3
    assert json.loads((base / "config.json").read_text())["vocab_size"] == rows
    assert {row.key.tensor for row in report.rows} == {f"{Q}.weight", EMBED, HEAD}
    one = whole(lora(tmp_path / "one", state, (Q,)), {EMBED: grown[EMBED]})
    with pytest.raises(PairingError, match=f"{EMBED}' from {rows} to {rows + 3} rows, and '{HEAD}'"):
        merge(base, [one], tmp_path / "never")
    with pytest.raises(PairingError, match="has weight 0.5"):
        merge(base, [f"{both}:0.5"], tmp_path / "never")
    with pytest.raises(PairingError, match="grow"):
        merge(base, [both, adapter(tmp_path / "f", {"lm_head": factors(*state[HEAD].shape)})], tmp_path / "never")


def tied(tmp_path, **config):
    state = {name: tensor for name, tensor in random_state(LLAMA).items() if name != HEAD}
    return state, write(tmp_path / "tied", state, {**LLAMA.config, "tie_word_embeddings": True, **config})


def test_a_head_that_the_base_ties_and_the_adapter_stores_is_untied(tmp_path):
    state, base = tied(tmp_path)
    new = torch.randn(state[EMBED].shape)
    report = merge(base, [whole(lora(tmp_path / "lora", state, (Q,)), {HEAD: new})], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert torch.equal(found[HEAD], new)
    assert torch.equal(found[EMBED], state[EMBED])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any(HEAD in note for note in report.notes)


def test_a_head_that_repeats_the_new_embedding_stays_tied(tmp_path):
    state, base = tied(tmp_path)
    new = torch.randn(state[EMBED].shape)
    merge(base, [whole(lora(tmp_path / "lora", state, (Q,)), {HEAD: new, EMBED: new.clone()})], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert HEAD not in found
    assert torch.equal(found[EMBED], new)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_embedding_that_bart_shares_is_replaced_once(tmp_path):
    """PEFT stores it for each module that uses it; the checkpoint stores it once."""
    base, tuned = planted_pair(tmp_path, FAMILIES["bart"])
    options = ExtractOptions(RankOptions(amounts=(4,)), FormOptions(dtype="fp32", extras="all"), CPU)
    extract(base, tuned, tmp_path / "lora", options=options)
    copies = [name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors") if "embed_tokens" in name]
    assert len(copies) == 2
    report = merge(base, [tmp_path / "lora"], tmp_path / "out")
    found, wanted = checkpoint(tmp_path / "out"), checkpoint(tuned)
    assert found.keys() == wanted.keys()
    assert torch.equal(found["model.shared.weight"], wanted["model.shared.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert not any("is added" in note for note in report.notes)


def test_of_two_tied_modules_each_changes_by_its_own_factors(tmp_path):
    """PEFT adds them where the module is called: a head alone parts from its embedding, both alike stay one."""
    state, base = tied(tmp_path)
    settings = {**LLAMA.config, "tie_word_embeddings": True}
    twice = write(tmp_path / "twice", {**state, HEAD: state[EMBED].clone()}, settings)
    alike = factors(*state[EMBED].shape)
    change = adapter(tmp_path / "lora", {"lm_head": alike})
    wanted = summed(state[EMBED], product(change, "lm_head"))
    for number, source in enumerate((base, twice)):
        merge(source, [change], tmp_path / f"head-{number}")
        found = checkpoint(tmp_path / f"head-{number}")
        assert np.array_equal(found[HEAD].numpy(), wanted)
        assert torch.equal(found[EMBED], state[EMBED])
        assert json.loads((tmp_path / f"head-{number}" / "config.json").read_text())["tie_word_embeddings"] is False
    copy = tuple(factor.clone() for factor in alike)
    both = adapter(tmp_path / "both", {"lm_head": alike, EMBED.removesuffix(".weight"): copy})
    merge(base, [both], tmp_path / "one")
    merged = checkpoint(tmp_path / "one")
    assert HEAD not in merged
    assert np.array_equal(merged[EMBED].numpy(), wanted)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["tie_word_embeddings"] is True
    merge(twice, [both], tmp_path / "two")
    merged = checkpoint(tmp_path / "two")
    assert np.array_equal(merged[EMBED].numpy(), wanted)
    assert np.array_equal(merged[HEAD].numpy(), wanted)
    apart = write(
        tmp_path / "apart", {**state, HEAD: state[EMBED].clone()}, {**LLAMA.config, "tie_word_embeddings": False}
    )
    merge(apart, [change], tmp_path / "head")
    assert torch.equal(checkpoint(tmp_path / "head")[EMBED], state[EMBED])


def test_biases_and_a_base_without_them(tmp_path):
    gpt2 = FAMILIES["gpt2"]
    state = random_state(gpt2)
    base = write(tmp_path / "base", state, gpt2.config)
    name = next(n for n in state if n.endswith("mlp.c_fc.weight")).removesuffix(".weight")
    bias = torch.randn(state[f"{name}.bias"].shape)
    change = whole(
        adapter(tmp_path / "lora", {name: factors(*state[f"{name}.weight"].shape[::-1])}, lora_bias=True),
        {f"{name}.lora_B.bias": bias},
    )
    report = merge(base, [f"{change}:0.5"], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert torch.allclose(found[f"{name}.bias"], state[f"{name}.bias"] + 0.5 * 2 * bias, atol=1e-6)
    assert np.array_equal(
        found[f"{name}.weight"].numpy(), summed(state[f"{name}.weight"], 0.5 * product(change, name).T)
    )
    assert {row.key.role for row in report.rows} == {"bias", "up_proj"}
    lean = write(tmp_path / "lean", {n: t for n, t in state.items() if n != f"{name}.bias"}, gpt2.config)
    with pytest.raises(PairingError, match=f"changes '{name}.bias', which the base lacks"):
        merge(lean, [change], tmp_path / "never")


def test_a_bias_of_zeros_where_the_base_has_none_changes_nothing(state, base, tmp_path):
    """PEFT's lora_bias gives every targeted module one."""
    change = lora(tmp_path / "lora", state, lora_bias=True)
    merge(base, [change], tmp_path / "without")
    whole(change, {f"{Q}.lora_B.bias": torch.zeros(state[f"{Q}.weight"].shape[0])})
    report = merge(base, [change], tmp_path / "out")
    found, wanted = checkpoint(tmp_path / "out"), checkpoint(tmp_path / "without")
    assert found.keys() == state.keys()
    assert all(bits(found[name]) == bits(tensor) for name, tensor in wanted.items())
    assert {row.key.tensor for row in report.rows} == {f"{Q}.weight", f"{DOWN}.weight"}


@pytest.mark.parametrize("name", ["opt", "llava", "gpt_neox", "whisper", "dinov2"])
@pytest.mark.parametrize("extras", ["bias", "all"])
def test_extracted_biases_merge_to_those_of_the_tuned_model(name, extras, tmp_path):
    base, tuned = planted_pair(tmp_path, FAMILIES[name])
    form = FormOptions(dtype="fp32", extras=extras)
    extract(base, tuned, tmp_path / "lora", options=ExtractOptions(RankOptions(amounts=(4,)), form, CPU))
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.bias") for name in stored)
    merge(base, [tmp_path / "lora"], tmp_path / "out")
    found, wanted, before = (checkpoint(folder) for folder in (tmp_path / "out", tuned, base))
    assert found.keys() == before.keys()
    biases = [n for n, t in before.items() if n.endswith(".bias") and not torch.equal(found[n], t)]
    assert len(biases) > 2
    assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in biases)


@pytest.mark.parametrize("kept", ["gate_proj", "up_proj"])
def test_biases_of_the_parts_of_a_matrix_are_added_to_their_rows(kept, tmp_path):
    family = FAMILIES["dinov2"]
    state = random_state(family)
    base = write(tmp_path / "base", state, family.config)
    stored = next(n for n in state if n.endswith("weights_in.weight")).removesuffix(".weight")
    rows, d_in = state[f"{stored}.weight"].shape
    module = re.sub(r"encoder\.layer\.", "layers.", stored).replace("weights_in", kept)
    bias = torch.randn(rows // 2)
    change = adapter(tmp_path / "lora", {module: factors(rows // 2, d_in)}, lora_bias=True)
    merge(base, [f"{whole(change, {f'{module}.lora_B.bias': bias})}:0.5"], tmp_path / "out")
    wanted, place = (
        state[f"{stored}.bias"].clone(),
        slice(0, rows // 2) if kept == "gate_proj" else slice(rows // 2, rows),
    )
    wanted[place] += 0.5 * 2 * bias
    assert torch.allclose(checkpoint(tmp_path / "out")[f"{stored}.bias"], wanted, atol=1e-6)


def test_adapters_of_another_base_and_sides_that_are_swapped(state, base, tmp_path):
    with pytest.raises(PairingError, match="targets 'elsewhere.weight'"):
        merge(base, [adapter(tmp_path / "a", {"elsewhere": factors(4, 4)})], tmp_path / "out")
    with pytest.raises(PairingError, match=f"'{Q}.weight': base has shape"):
        merge(base, [adapter(tmp_path / "b", {Q: factors(5, 7)})], tmp_path / "out")
    with pytest.raises(PairingError, match="name the checkpoint first"):
        merge(tmp_path / "b", [base], tmp_path / "out")
    with pytest.raises(PairingError, match="deltaspec extract"):
        merge(base, [base], tmp_path / "out")
    with pytest.raises(OptionError, match="at least one adapter"):
        merge(base, [], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "b"}


def test_overwriting(state, base, tmp_path):
    change = lora(tmp_path / "lora", state)
    merge(base, [change], tmp_path / "out")
    first = checkpoint(tmp_path / "out")
    with pytest.raises(RunError, match="--overwrite"):
        merge(base, [f"{change}:2"], tmp_path / "out")
    merge(base, [f"{change}:2"], tmp_path / "out", overwrite=True)
    assert not torch.equal(checkpoint(tmp_path / "out")[f"{Q}.weight"], first[f"{Q}.weight"])
    for place in (base, change, tmp_path):
        with pytest.raises(RunError, match="it is or holds an input|not deltaspec's"):
            merge(base, [change], place, overwrite=True)


@pytest.mark.parametrize(("text", "wanted"), [
    ("a/b", ("a/b", 1.0)),
    ("a/b:0.5", ("a/b", 0.5)),
    ("a/b:-1e-1", ("a/b", -0.1)),
    ("owner/name@v1.0:2", ("owner/name@v1.0", 2.0)),
    ("owner/name@v1.0", ("owner/name@v1.0", 1.0)),
    ("C:\\models\\lora", ("C:\\models\\lora", 1.0)),
    ("C:\\models\\lora:0.5", ("C:\\models\\lora", 0.5)),
    ("odd:name", ("odd:name", 1.0)),
    ("odd:name:3", ("odd:name", 3.0)),
    ("there:0.5", ("there:0.5", 1.0)),
    ("there:0.5:2", ("there:0.5", 2.0)),
    (":0.5", (":0.5", 1.0)),
])  # fmt: skip
def test_where_a_path_ends_and_its_weight_begins(text, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there:0.5").mkdir()
    assert parse_adapter(text) == wanted


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers(weight):
    with pytest.raises(OptionError, match="expected a number"):
        parse_adapter(f"a/b:{weight}")
    with pytest.raises(OptionError, match="expected a number"):
        merge("base", [("a/b", float(weight))], "out")


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in ("merge", *words)])


def test_the_command_prints_losses_by_role_and_in_total(state, base, tmp_path):
    change = lora(tmp_path / "lora", state, scale=1e-3)
    result = call(base, f"{change}:0.5", "-o", tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    rounded = state[f"{Q}.weight"].dtype == torch.bfloat16
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:4]] == [
        ["q_proj", "1"],
        ["down_proj", "1"],
        ["total", "2"],
    ]
    assert ("--dtype fp32" in result.stdout) == rounded
    found = json.loads(call(base, f"{change}:0.5", "-o", tmp_path / "out", "--quiet", "--overwrite", "--json").stdout)
    assert found["adapters"][0]["weight"] == 0.5
    assert (found["total"]["relative_loss"] > 0.05) == rounded
    assert math.isclose(found["total"]["relative_loss"], math.sqrt(
        sum(row["error"] for row in found["matrices"]) / sum(row["update"] for row in found["matrices"])
    ))  # fmt: skip
    assert json.loads((tmp_path / "out" / "deltaspec.json").read_text()) == found
    if rounded:
        kept = call(base, change, "-o", tmp_path / "fp32", "--quiet", "--dtype", "fp32")
        assert "serve the adapter" not in kept.stdout


def test_mistakes_are_one_sentence_and_exit_2(base, tmp_path):
    for words in ((base, base), (base, tmp_path / "none"), (base,), (base, base, "--dtype", "int4")):
        result = call(*words, "-o", tmp_path / "out", "--quiet")
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output


def test_progress_counts_every_tensor(state, base, tmp_path):
    steps = []
    merge(base, [lora(tmp_path / "lora", state)], tmp_path / "out", progress=steps.append)
    assert [step.done for step in steps] == list(range(len(state) + 1))
    assert (steps[-1].total, steps[-1].work_done) == (len(state), steps[-1].work_total)
    assert steps[-1].weights_done == sum(tensor.numel() for tensor in state.values())


def test_a_header_of_hostile_names_stays_in_its_folder(state, tmp_path):
    """An index that points out of the base is refused before anything is written."""
    base = write(tmp_path / "base", state, LLAMA.config, shards=2)
    index = base / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"][f"{Q}.weight"] = "../../evil.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        merge(base, [lora(tmp_path / "lora", state)], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora"}


def test_shards_in_subfolders_stay_there(state, tmp_path):
    base = write(tmp_path / "base", state, LLAMA.config, shards=2)
    index = base / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    moved = "model-00002-of-00002.safetensors"
    (base / "deep").mkdir()
    (base / moved).rename(base / "deep" / moved)
    found["weight_map"] = {n: f"deep/{f}" if f == moved else f for n, f in found["weight_map"].items()}
    index.write_text(json.dumps(found))
    merge(base, [lora(tmp_path / "lora", state)], tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == found["weight_map"]
    )
    assert (tmp_path / "out" / "deep" / moved).is_file()


def test_headers_are_read_by_the_format_alone(state, base, tmp_path):
    """Eight bytes of length, JSON, then exactly the bytes that it promises."""
    merge(base, [lora(tmp_path / "lora", state)], tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        ends = [said["data_offsets"][1] for name, said in header.items() if name != "__metadata__"]
        assert 8 + length + max(ends) == len(raw)


def test_head_and_embedding_with_factors_of_their_own_come_apart(tmp_path):
    """As in the unmerged model, where each use of the tied weight has its own change."""
    state, base = tied(tmp_path)
    d_out, d_in = state[EMBED].shape
    change = adapter(tmp_path / "lora", {"lm_head": factors(d_out, d_in, seed=1)})
    lora_A, lora_B = factors(d_in, d_out, seed=2)  # an embedding's factors are stored transposed
    whole(
        change,
        {"model.embed_tokens.lora_embedding_A": lora_A, "model.embed_tokens.lora_embedding_B": lora_B},
    )
    merge(base, [change], tmp_path / "out")
    found = checkpoint(tmp_path / "out")
    assert np.array_equal(found[HEAD].numpy(), summed(state[EMBED], product(change, "lm_head")))
    wanted = summed(state[EMBED], 2 * (lora_B.double() @ lora_A.double()).T.numpy())
    assert np.array_equal(found[EMBED].numpy(), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_weight_saved_beside_its_factors_goes_first(tmp_path):
    """PEFT saves an embedding with its factors; where it is not the base's own, the factors belong to that one."""
    state = random_state(LLAMA)
    base = write(tmp_path / "base", state, LLAMA.config)
    for number, moved in enumerate((state[HEAD].clone(), state[HEAD] + 1)):
        change = adapter(tmp_path / f"lora{number}", {"lm_head": factors(*state[HEAD].shape)})
        whole(change, {"lm_head.base_layer.weight": moved})
        merge(base, [change], tmp_path / f"out{number}")
        found = checkpoint(tmp_path / f"out{number}")[HEAD]
        assert np.array_equal(found.numpy(), summed(moved, product(change, "lm_head")))
