"""Meta's own files: read as the model that transformers converts them into, or refused with the way out."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.cli.main import cli
from deltaspec.errors import CheckpointError
from deltaspec.io.fingerprint import fingerprint
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.options import ExtractOptions, RankOptions
from tests.field.meta_models import (
    CONFIG,
    PARAMS,
    ROWS,
    hugging_face,
    meta,
    rank_of,
    turn_back,
    write_hugging_face,
    write_meta,
)
from tests.io.files import refusal
from tests.io.test_hub import Hub, opened


def read(folder):
    return {name: read_tensor(spec) for name, spec in open_plain(folder).tensors.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("by_vocabulary", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])  # of 2 key heads, 8 ranks hold a quarter each
def test_every_number_is_where_hugging_face_has_it(tmp_path, ranks, by_vocabulary):
    state = hugging_face(0, dtype=torch.bfloat16)
    assert_same(read(write_meta(tmp_path / "m", meta(state), ranks, by_vocabulary=by_vocabulary)), state)


def test_attention_scores_are_those_of_metas_rotary_embedding():
    """Meta turns neighbours, (x₂ᵢ + i·x₂ᵢ₊₁)·e^{iθ}; Hugging Face turns halves: with its rows the scores are equal."""
    hidden, angles = torch.randn(5, 24).double(), torch.outer(torch.arange(5.0), 0.5 ** torch.arange(ROWS / 2)).double()
    weights = [torch.randn(ROWS, 24).double() for _ in "qk"]

    def neighbours(weight):
        turned = torch.view_as_complex((hidden @ turn_back(weight, 1).T).view(5, -1, 2)) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(1)

    def halves(weight):
        values = hidden @ weight.T
        first, second = values.chunk(2, 1)
        twice = torch.cat([angles, angles], 1)
        return values * twice.cos() + torch.cat([-second, first], 1) * twice.sin()

    metas, theirs = ([turned(weight) for weight in weights] for turned in (neighbours, halves))
    assert torch.allclose(metas[0] @ metas[1].T, theirs[0] @ theirs[1].T)


@pytest.mark.parametrize("source", ["params", "model", "config", "nested"])
def test_heads_come_from_what_lies_beside(tmp_path, source):
    state = hugging_face(0)
    folder = write_meta(tmp_path / "m", meta(state), 2, params=source == "params")
    if source == "model":
        (folder / "params.json").write_text(json.dumps({"model": PARAMS}))
    elif source != "params":
        (folder / "config.json").write_text(json.dumps(CONFIG if source == "config" else {"text_config": CONFIG}))
    assert_same(read(folder), state)


def test_stored_frequencies_tell_the_heads_where_they_make_up_the_width(tmp_path):
    """Llama 1 and 2 store rope.freqs, one for each pair of a head's rows."""
    tensors = {"tok_embeddings.weight": torch.randn(9, 16), "norm.weight": torch.ones(16), "rope.freqs": torch.ones(4)}
    query, key = torch.randn(16, 16), torch.randn(8, 16)
    tensors["freqs_cis"] = torch.ones(7, 4)  # what torchtitan keeps beside
    tensors |= {"layers.0.attention.wq.weight": turn_back(query, 2), "layers.0.attention.wk.weight": turn_back(key, 1)}
    found = read(write_meta(tmp_path / "m", tensors, params=False))
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], query)
    assert torch.equal(found["model.layers.0.self_attn.k_proj.weight"], key)
    assert not any("rope" in name or "freqs" in name for name in found)


@pytest.mark.parametrize("sharded", [False, True])
def test_mistrals_safetensors_hold_the_same_layout(tmp_path, sharded):
    state = hugging_face(0)
    named = meta(state)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    if sharded:
        files = [f"consolidated-0000{number}-of-00002.safetensors" for number in (1, 2)]
        places = {name: files[number % 2] for number, name in enumerate(named)}
        for file in files:
            save_file({name: tensor for name, tensor in named.items() if places[name] == file}, tmp_path / file)
        (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_file(named, tmp_path / "consolidated.safetensors")
    assert_same(read(tmp_path), state)


def test_hugging_faces_own_files_beside_them_are_read_instead(tmp_path):
    state = hugging_face(0)
    folder = write_hugging_face(tmp_path / "m", state)
    save_file({"unlike": torch.ones(3)}, folder / "consolidated.safetensors")
    assert_same(read(folder), state)


def test_mixtrals_experts_and_tensors_that_share_memory(tmp_path):
    named = {name: tensor for name, tensor in meta(hugging_face(0)).items() if "feed_forward" not in name}
    named["output.weight"] = named["tok_embeddings.weight"]
    experts = {f"layers.{d}.feed_forward.experts.{e}.w{k}.weight" for d in (0, 1) for e in (0, 1) for k in (1, 3)}
    named |= {name: torch.randn(40, 24) for name in experts}
    named |= {f"layers.{d}.feed_forward.gate.weight": torch.randn(2, 24) for d in (0, 1)}
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    torch.save(named, tmp_path / "consolidated.00.pth")
    source = open_plain(tmp_path)
    assert source.aliases == {"model.embed_tokens.weight": "lm_head.weight"} or source.aliases == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    found = read(tmp_path)
    wanted = named["layers.1.feed_forward.experts.0.w3.weight"]
    assert torch.equal(found["model.layers.1.block_sparse_moe.experts.0.w3.weight"], wanted)
    assert found["model.layers.0.block_sparse_moe.gate.weight"].shape == (2, 24)


def test_coarse_floats_keep_their_bits(tmp_path):
    """Torch moves no rows of fp8 by itself."""
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in meta(hugging_face(0)).items()}
    found = read(write_meta(tmp_path / "m", state, 2))
    wanted = hugging_face(0)["model.layers.0.self_attn.q_proj.weight"].to(torch.float8_e4m3fn)
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"].float(), wanted.float())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_beside_itself_has_not_changed_and_a_change_has_its_energy(tmp_path, ranks):
    before, after = hugging_face(0), hugging_face(1)
    base = write_hugging_face(tmp_path / "base", before)
    same, tuned = (write_meta(tmp_path / n, meta(s), ranks) for n, s in (("same", before), ("tuned", after)))
    run = deltaspec.analyze(base, same, tmp_path / "r")
    assert len(run.records) == 16
    assert all(record.metrics["frobenius_norm"] == 0 for record in run.records)
    assert any("Meta's layout" in note for note in run.manifest["notes"])
    for record in deltaspec.analyze(base, tuned, tmp_path / "r2").records:
        name = record.key.tensor
        truth = float((after[name].double() - before[name].double()).norm())
        assert record.metrics["frobenius_norm"] == pytest.approx(truth, rel=1e-12)


def test_factors_fit_the_converted_model_whatever_the_sides_are_stored_as(tmp_path):
    states = {"base": hugging_face(0), "tuned": hugging_face(1)}
    theirs = [write_hugging_face(tmp_path / "hf" / name, state) for name, state in states.items()]
    metas = [write_meta(tmp_path / "meta" / name, meta(state), 2) for name, state in states.items()]
    options = ExtractOptions(ranks=RankOptions(amounts=(3,)))
    for number, sides in enumerate([theirs, metas]):
        deltaspec.extract(*sides, tmp_path / str(number), options=options)
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "01")
    assert_same(second, first)


def test_without_heads_every_command_says_what_to_do(tmp_path):
    base = write_hugging_face(tmp_path / "base", hugging_face(0))
    tuned = write_meta(tmp_path / "tuned", meta(hugging_face(1)), 2, params=False)
    deltaspec.extract(base, write_hugging_face(tmp_path / "t", hugging_face(1)), tmp_path / "adapter")
    out = ["-o", str(tmp_path / "out")]
    for command in (
        ["analyze", base, tuned, *out],
        ["analyze", tuned, tuned, *out],
        ["extract", base, tuned, *out],
        ["verify", base, tuned, tmp_path / "adapter"],
        ["merge", tuned, tmp_path / "adapter", *out],
    ):
        result = CliRunner().invoke(cli, [str(word) for word in command])
        assert result.exit_code == 2
        assert "convert_llama_weights_to_hf" in result.output
        assert "remove" not in result.output


def test_a_base_in_metas_layout_takes_no_merge(tmp_path):
    base = write_meta(tmp_path / "meta", meta(hugging_face(0)))
    deltaspec.extract(base, write_hugging_face(tmp_path / "t", hugging_face(1)), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="Meta's layout.*convert_llama_weights_to_hf"):
        deltaspec.merge(base, [tmp_path / "adapter"], tmp_path / "merged")


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 1, 2]])
def test_missing_ranks_are_missed(tmp_path, kept):
    folder = write_meta(tmp_path / "m", meta(hugging_face(0)), 4)
    for rank in set(range(4)) - set(kept):
        (folder / f"consolidated.{rank:02d}.pth").unlink()
    assert "all consolidated files" in refusal(folder)
    assert "all consolidated files" in refusal(folder / f"consolidated.{kept[0]:02d}.pth")


def test_ranks_that_do_not_fit_each_other_are_refused(tmp_path):
    folder = write_meta(tmp_path / "m", meta(hugging_face(0)), 2)
    rank = torch.load(folder / "consolidated.01.pth")
    torch.save({name: tensor for name, tensor in rank.items() if "w3" not in name}, folder / "consolidated.01.pth")
    assert "1 of 2 rank files" in refusal(folder)
    torch.save({name: tensor.half() for name, tensor in rank.items()}, folder / "consolidated.01.pth")
    assert "Cannot join" in refusal(folder)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_under_other_names_may_be_a_part_of_a_model(tmp_path, ranks):
    state = hugging_face(0)
    for rank in range(ranks):
        torch.save(rank_of(state, rank, 2, by_vocabulary=True), tmp_path / f"consolidated.{rank:02d}.pth")
    said = refusal(tmp_path)
    assert "tensor-parallel rank" in said
    assert "remove" not in said


def test_what_has_no_place_in_the_layout_is_named(tmp_path):
    named = meta(hugging_face(0)) | {"vision_encoder.patch_conv.weight": torch.ones(2, 2)}
    assert "'vision_encoder.patch_conv.weight'" in refusal(write_meta(tmp_path / "m", named))
    prefixed = {f"text_model.{name}": tensor for name, tensor in meta(hugging_face(0)).items()}
    assert "no place in" in refusal(write_meta(tmp_path / "p", prefixed))


@pytest.mark.parametrize("wrong", [{"n_heads": 3}, {"dim": 25}, {"n_kv_heads": 4}, {"head_dim": 7}, {"head_dim": 4}])
def test_sizes_of_another_model_are_noticed(tmp_path, wrong):
    folder = write_meta(tmp_path / "m", meta(hugging_face(0)))
    (folder / "params.json").write_text(json.dumps(PARAMS | wrong))
    assert "params.json" in refusal(folder)


def test_other_heads_are_another_source(tmp_path):
    """A run must not go on with what another params.json gave."""
    folder = write_meta(tmp_path / "m", meta(hugging_face(0)))
    before = fingerprint(open_plain(folder))
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": -1}))
    assert fingerprint(open_plain(folder)) != before


def test_joined_queries_keys_and_values_in_metas_order_are_not_taken_for_hugging_faces(tmp_path):
    """gpt-fast joins wq, wk and wv of converted files, and keeps the order of their rows."""
    named = meta(hugging_face(0))
    joined = {name: tensor for name, tensor in named.items() if not name.endswith(("wq.weight", "wk.weight"))}
    joined["layers.0.attention.wqkv.weight"] = torch.randn(64, 24)
    torch.save(joined, tmp_path / "model.pth")
    assert "convert" in refusal(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    assert "'layers.0.attention.wqkv.weight'" in refusal(tmp_path)


def test_a_model_with_code_of_its_own_keeps_its_names(tmp_path):
    named = meta(hugging_face(0))
    save_file(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}))
    assert_same(read(tmp_path), named)
    prefixed = {f"model.{name}": tensor for name, tensor in named.items()}
    save_file(prefixed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    assert_same(read(tmp_path), prefixed)


def test_a_model_of_the_hub_comes_with_its_sizes(tmp_path):
    server = Hub(tmp_path / "remote")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        write_meta(server.root / "owner" / "name", meta(hugging_face(0)), 2)
        (found,) = opened("owner/name", home=tmp_path / "home", endpoint=server.endpoint)
        assert set(found["tensors"]) == set(hugging_face(0))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_diffusion_transformer_of_like_names_is_no_language_model(tmp_path):
    """Lumina names its attention so, and has no other layout to be read in."""
    names = [f"layers.0.attention.{name}.weight" for name in ("wq", "wk", "wv", "wo", "wk_y")]
    tensors = {name: torch.randn(8, 8) for name in [*names, "x_embedder.weight"]}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    assert_same(read(tmp_path), tensors)
