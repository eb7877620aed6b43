"""What a training saves is what it measured, whatever the base's dtype, padding, classes and positions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from deltaspec.errors import OptionError
from deltaspec.options import DataOptions
from deltaspec.workflows.analysis.analyze import analyze
from tests.tiny_models import SIZES, build, save, write_tokenizer
from tests.workflows.training.train_case import held_out, run, write_case

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "tied")


@pytest.fixture
def root(case, tmp_path):
    """A folder with the data alone, where a test puts its own model."""
    shutil.copyfile(case / "data.csv", tmp_path / "data.csv")
    return tmp_path


def load_classifier(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ["full", "last_layers", "bitfit"])
def test_what_is_measured_is_what_is_saved_of_a_narrow_base(root, method):
    """A step far below bf16's resolution: transformers runs the file in float32 to the loss that was reported."""
    save(build("classifier").bfloat16(), root / "bert")
    given = {"method": method, "loop": {"lr": 2e-5, "steps": 3}}
    report = run(root, root / "out", **given)
    loaded = load_classifier(root / "out/final")
    assert loaded.dtype == torch.float32
    assert any("of float32 weights, and what is saved is in float32" in note for note in report["notes"])
    learned = report["results"]["learned"]
    assert held_out(root, "bert", loaded) == pytest.approx(learned["loss"], abs=1e-7)
    assert abs(learned["loss"] - learned["before"]["loss"]) > 1e-6
    assert not analyze(root / "bert", root / "out/final", root / "run").failures
    config = root / "bert/config.json"  # an older transformers names it otherwise
    config.write_text(config.read_text().replace('"dtype"', '"torch_dtype"'))
    run(root, root / "again", **given)
    assert json.loads((root / "again/final/config.json").read_text())["torch_dtype"] == "float32"


def test_a_whole_checkpoint_has_the_names_of_the_base_and_all_of_a_change(case, tmp_path):
    """bf16 and tied: W + BA in float32, from the adapter that the same training leaves without --save full."""
    for kind in ("full", "adapter"):
        report = run(case, tmp_path / kind, "tied", loop={"lr": 1e-4}, method_options={"rank": 4}, run={"save": kind})
    assert any("of bfloat16 weights" in note for note in report["notes"])
    base, tuned = load_file(case / "tied" / WEIGHTS), load_file(tmp_path / "full/final" / WEIGHTS)
    assert {name: tensor.shape for name, tensor in base.items()} == {n: t.shape for n, t in tuned.items()}
    adapter = load_file(tmp_path / "adapter/final/adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter/final/adapter_config.json").read_text())
    changed = 0
    for name, weight in base.items():
        wanted, down = weight.double(), f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if down in adapter:
            up = adapter[down.replace("lora_A", "lora_B")].double()
            wanted = wanted + config["lora_alpha"] / config["r"] * up @ adapter[down].double()
            changed += 1
        assert tuned[name].dtype == torch.float32
        assert torch.allclose(tuned[name], wanted.float(), rtol=2e-7, atol=0)
    assert changed == 14


def test_what_pissa_keeps_beside_the_base_is_not_merged_into_it(case, tmp_path):
    """Its first factors are buffers of the running model, and no tensors of a checkpoint."""
    options = {"rank": 2, "init": "pissa"}
    run(case, tmp_path / "out", "tied", loop={"steps": 1}, method_options=options, run={"save": "full"})
    assert load_file(tmp_path / "out/final" / WEIGHTS).keys() == load_file(case / "tied" / WEIGHTS).keys()


@pytest.mark.parametrize("stated", [24, None])
def test_a_causal_classifier_reads_the_last_token_of_the_text(root, stated):
    """Its config has another padding token than its tokenizer, or none; the oracle pads nothing."""
    model = build("gpt2")
    model.config.pad_token_id = stated
    save(model, root / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "bert")
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(root / "bert")
    report = run(root, root / "out", method="full", loop={"batch": 8})
    loaded = load_classifier(root / "out/final")
    assert loaded.config.pad_token_id == 0
    loaded.config.pad_token_id = None  # then it reads the last one
    assert held_out(root, "bert", loaded) == pytest.approx(report["results"]["learned"]["loss"], rel=1e-5)


def test_a_head_of_unnamed_classes_is_drawn_anew(root):
    """transformers leaves out the names of two classes; whether the first is neg or pos, nobody knows."""
    save(build("classifier", num_labels=2), root / "stored")
    assert "id2label" not in json.loads((root / "stored/config.json").read_text())
    stored = load_file(root / "stored" / WEIGHTS)["classifier.weight"]
    text = (root / "data.csv").read_text()
    (root / "same.csv").write_text(text.replace(",neg", ",LABEL_0").replace(",pos", ",LABEL_1"))
    for name, same in (("data", False), ("same", True)):
        run(root, root / name, "stored", data=root / f"{name}.csv", loop={"lr": 1e-12, "steps": 1})
        head = load_file(root / name / "final/adapter_model.safetensors")["base_model.model.classifier.weight"]
        assert torch.allclose(head, stored, atol=1e-6) is same


def test_positions_that_begin_after_the_padding_are_fewer(root):
    """RoBERTa's: 12 rows and padding 1 leave 10 positions."""
    sizes = {**SIZES, "vocab_size": 25, "max_position_embeddings": 12, "num_labels": 2, "pad_token_id": 1}
    transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes)).save_pretrained(root / "bert")
    write_tokenizer(root / "bert", causal=False)
    data = root / "long.csv"
    data.write_text("text,label\n" + "".join(f"{'the ' * (3 + n)}{'cat' * (n % 2)},{n % 2}\n" for n in range(12)))
    with pytest.raises(OptionError, match="takes 10: pass --cut"):
        run(root, root / "out", data=data)
    run(root, root / "out", data=data, data_options=DataOptions(cut=True), loop={"steps": 2})
