"""Folders of sentence-transformers: what modules.json lists is part of the model, analysed, named and copied."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.cli.main import cli
from deltaspec.errors import PairingError
from deltaspec.io.matrix import read_tensor
from deltaspec.io.open import open_plain
from deltaspec.options import ExtractOptions, FormOptions
from tests.families import FAMILIES, random_state, write
from tests.io.files import refusal
from tests.io.test_hub import Hub, opened
from tests.io.test_peft import factors, write_adapter

BERT = FAMILIES["bert"]
KINDS = "sentence_transformers.models."
LISTED = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]


def sentence_model(folder, seed, *, dense_seed=None, listed=LISTED, pickled=False):
    """As sentence-transformers saves one; the folder of Normalize is empty, and git keeps none of those."""
    write(folder, random_state(BERT, seed=seed), BERT.config)
    generator = torch.Generator().manual_seed(seed if dense_seed is None else dense_seed)
    width = 16
    shapes = {"linear.weight": (8, width), "linear.bias": (8,)}
    dense = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": width, "out_features": 8}))
    if pickled:
        torch.save(dense, folder / "2_Dense" / "pytorch_model.bin")
    else:
        save_file(dense, folder / "2_Dense" / "model.safetensors")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    rows = [{"idx": i, "name": str(i), "path": path, "type": KINDS + kind} for i, (path, kind) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def sides(tmp_path):
    return sentence_model(tmp_path / "base", 0), sentence_model(tmp_path / "tuned", 1)


def change(sides, name="2_Dense/model.safetensors", tensor="linear.weight"):
    before, after = (load_file(side / name)[tensor].double() for side in sides)
    return after - before


def test_a_modules_change_is_measured_under_its_folders_name(tmp_path, sides):
    run = deltaspec.analyze(*sides, tmp_path / "run")
    (record,) = [record for record in run.records if record.key.tensor.startswith("2_Dense")]
    assert record.key.tensor == "2_Dense.linear.weight"
    assert record.metrics["frobenius_norm"] == pytest.approx(float(change(sides).norm()), rel=1e-12)
    rows = {row["tensor"]: row for row in run.vectors}
    bias = load_file(sides[0] / "2_Dense" / "model.safetensors")["linear.bias"]
    wanted = change(sides, tensor="linear.bias").norm() / bias.norm()
    assert rows["2_Dense.linear.bias"]["relative_norm"] == pytest.approx(float(wanted), rel=1e-6)
    assert not any("2_Dense" in row["tensor"] for row in run.manifest["skipped"])


@pytest.mark.parametrize("extras", ["none", "bias", "all"])
def test_no_adapter_carries_it_and_the_share_that_is_kept_knows(tmp_path, sides, extras):
    options = ExtractOptions(form=FormOptions(extras=extras))
    deltaspec.extract(*sides, tmp_path / "adapter", options=options)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("2_Dense" in name or name.endswith("linear.weight") for name in stored)
    report = json.loads((tmp_path / "adapter" / "deltaspec.json").read_text())
    rows = {row["tensor"]: row for row in report["not_carried"] if "2_Dense" in row["tensor"]}
    assert set(rows) == {"2_Dense.linear.weight", "2_Dense.linear.bias"}
    assert all("beside the model" in row["reason"] for row in rows.values())
    before, after = (random_state(BERT, seed=seed) for seed in (0, 1))
    total = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    dense = float(change(sides).square().sum())
    total += dense + float(change(sides, tensor="linear.bias").square().sum())
    assert rows["2_Dense.linear.weight"]["share"] == pytest.approx(dense / total, rel=1e-4)


def test_what_changes_beside_the_model_changes_nothing_of_its_adapter(tmp_path):
    """Biases of the model decide how embeddings are stored; a Dense's are none of them."""
    options, stored = ExtractOptions(form=FormOptions(extras="all")), []
    for dense in (0, 1):
        base, tuned = (sentence_model(tmp_path / f"{dense}{n}", n, dense_seed=n * dense) for n in (0, 1))
        state = random_state(BERT, seed=1) | {k: v for k, v in random_state(BERT).items() if k.endswith("bias")}
        save_file(state, tuned / "model.safetensors")
        deltaspec.extract(base, tuned, tmp_path / str(dense), options=options)
        stored.append(load_file(tmp_path / str(dense) / "adapter_model.safetensors"))
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())


@pytest.mark.parametrize("pickled", [False, True])
def test_a_merged_folder_has_every_module_byte_for_byte(tmp_path, pickled):
    base, tuned = (sentence_model(tmp_path / str(n), n, dense_seed=0, pickled=pickled) for n in (0, 1))
    (base / "3_Normalize").mkdir()
    deltaspec.extract(base, tuned, tmp_path / "adapter")
    merged = tmp_path / "merged"
    deltaspec.merge(base, [tmp_path / "adapter"], merged)
    files = {file.relative_to(base) for file in base.rglob("*") if file.is_file()}
    written = {file.relative_to(merged) for file in merged.rglob("*") if file.is_file()}
    assert written == files | {Path("deltaspec.json")}
    for file in files:
        if file != Path("model.safetensors"):
            assert (merged / file).read_bytes() == (base / file).read_bytes()
    assert set(load_file(merged / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    assert set(open_plain(merged).tensors) == set(open_plain(base).tensors)
    deltaspec.merge(base, [tmp_path / "adapter"], merged, overwrite=True)
    assert (merged / "2_Dense" / "config.json").exists()


def test_a_base_named_by_its_file_is_the_same_model(tmp_path, sides):
    """What merge copies beside the weights, modules.json too, is the same in either way."""
    file = open_plain(sides[0] / "model.safetensors")
    assert file.tensors == open_plain(sides[0]).tensors
    assert file.folders == ("1_Pooling", "2_Dense", "3_Normalize")
    (inner,) = [spec for spec in file.tensors.values() if spec.name == "2_Dense.linear.bias"]
    assert torch.equal(read_tensor(inner), load_file(sides[0] / "2_Dense" / "model.safetensors")["linear.bias"])


def test_a_model_of_the_hub_comes_with_its_modules(tmp_path):
    server = Hub(tmp_path / "remote")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        sentence_model(server.root / "owner" / "name", 0)
        save_file({"x": torch.ones(1)}, server.root / "owner" / "name" / "2_Dense" / "unlisted.safetensors")
        home = tmp_path / "home"
        (online,) = opened("owner/name", home=home, endpoint=server.endpoint)
        (cached,) = opened("owner/name", home=home, endpoint=server.endpoint, HF_HUB_OFFLINE="1")
        assert online["tensors"] == cached["tensors"]
        assert {"2_Dense.linear.weight", "2_Dense.linear.bias"} <= set(online["tensors"])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_only_one_side_has_modules(tmp_path):
    base = write(tmp_path / "base", random_state(BERT), BERT.config)
    tuned = sentence_model(tmp_path / "tuned", 1)
    run = deltaspec.analyze(base, tuned, tmp_path / "run")
    assert {"2_Dense.linear.weight", "2_Dense.linear.bias"} <= {row["tensor"] for row in run.manifest["skipped"]}
    deltaspec.extract(base, tuned, tmp_path / "adapter", options=ExtractOptions(form=FormOptions(extras="all")))
    report = json.loads((tmp_path / "adapter" / "deltaspec.json").read_text())
    assert "2_Dense.linear.weight" in {row["tensor"] for row in report["not_carried"]}
    assert not any("Dense" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_modules_inside_a_module_are_found(tmp_path):
    """A Router (Asym before) keeps its routes in folders of its own."""
    folder = sentence_model(tmp_path / "m", 0, listed=[("", "Transformer"), ("1_Router", "Router")])
    for route in ("query_0_Dense", "document_0_Dense"):
        (folder / "1_Router" / route).mkdir(parents=True)
        save_file({"linear.weight": torch.eye(3)}, folder / "1_Router" / route / "model.safetensors")
    source = open_plain(folder)
    assert torch.equal(read_tensor(source.tensors["1_Router.query_0_Dense.linear.weight"]), torch.eye(3))
    assert "1_Router.document_0_Dense.linear.weight" in source.tensors
    assert not any("2_Dense" in name for name in source.tensors)  # not listed


def test_files_of_one_name_have_each_their_own_fingerprint_and_time(tmp_path, sides):
    manifest = deltaspec.analyze(*sides, tmp_path / "run").manifest
    wanted = {"model.safetensors", "2_Dense/model.safetensors"}
    assert wanted <= set(manifest["base"]["files"])
    assert set(manifest["base"]["modified"]) == wanted


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b", "C:\\x", "..\\x", "a\0b", 3, None, ["x"]])
def test_no_path_leaves_the_folder(tmp_path, path):
    folder = sentence_model(tmp_path / "m", 0)
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": "x"}, {"path": path, "type": "y"}]))
    assert "modules.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{}", "[3]", '[{"type": "x"}]', "[" * 99999, '{"path": "a"}'])
def test_a_list_that_is_none(tmp_path, text):
    folder = sentence_model(tmp_path / "m", 0)
    (folder / "modules.json").write_text(text)
    assert "expected a list of modules" in refusal(folder)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("secret")
    folder = sentence_model(tmp_path / "m", 0, dense_seed=0)
    (folder / "3_Normalize").symlink_to(tmp_path / "secret")
    (folder / "1_Pooling" / "key.txt").symlink_to(tmp_path / "secret" / "key.txt")
    deltaspec.extract(folder, sentence_model(tmp_path / "t", 1, dense_seed=0), tmp_path / "adapter")
    deltaspec.merge(folder, [tmp_path / "adapter"], tmp_path / "merged")
    assert not list((tmp_path / "merged").rglob("key.txt"))


@pytest.mark.parametrize("side", [0, 1])
def test_a_dense_without_its_weights_is_a_missing_piece(tmp_path, sides, side):
    (sides[side] / "2_Dense" / "model.safetensors").unlink()
    result = CliRunner().invoke(cli, ["analyze", *map(str, sides), "-o", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "lists a Dense in '2_Dense', whose weights are missing" in result.output


def test_missing_shards_of_a_module_are_missed(tmp_path, sides):
    dense = sides[0] / "2_Dense"
    (dense / "model.safetensors").rename(dense / "model-00001-of-00002.safetensors")
    assert "'model-00002-of-00002.safetensors' is missing" in refusal(sides[0])


def test_names_of_modules_never_meet_the_models_own(sides):
    source = open_plain(sides[0])
    own = set(load_file(sides[0] / "model.safetensors"))
    assert own | {"2_Dense.linear.weight", "2_Dense.linear.bias"} == set(source.tensors)


def test_an_adapter_of_a_module_beside_the_model_is_refused(tmp_path, sides):
    adapter = write_adapter(tmp_path / "adapter", factors("2_Dense.linear", d_out=8, d_in=16))
    with pytest.raises(PairingError, match="2_Dense"):
        deltaspec.merge(sides[0], [adapter], tmp_path / "merged")
