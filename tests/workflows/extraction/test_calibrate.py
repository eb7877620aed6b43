"""Second moments against dense XᵀX from hooks of our own; text files; kills; what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaspec.errors import CheckpointError, DeltaspecError, MissingPackageError, NumericalError, OptionError, RunError
from deltaspec.io.moments import open_moments
from deltaspec.options import CalibrateOptions, TextOptions
from deltaspec.workflows.extraction.calibrate import calibrate
from deltaspec.workflows.shared.text_batches import Intake, Text, make_batches
from tests.tiny_models import VOCAB, build, save, write_text, write_tokenizer

LENGTH = 8
OPTIONS = CalibrateOptions(TextOptions(length=LENGTH, batch=3))
MODELS = ("llama", "tied", "gpt2", "bert", "masked", "classifier", "t5")
CAUSAL = ("llama", "tied", "gpt2")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def llama(tmp_path):
    return save(build("llama"), tmp_path / "llama")


def sequences(text, *, causal):
    """The token ids that the model should see, one list a sequence: words looked up by hand."""
    lines = [line.split() for line in text.read_text().splitlines() if line]
    rows = [[VOCAB[word] for word in line] for line in lines]
    if not causal:
        return [[VOCAB["[CLS]"], *row[: LENGTH - 2], VOCAB["[SEP]"]] for row in rows]
    stream = [token for row in rows for token in (*row, VOCAB["[SEP]"])]
    return [stream[start : start + LENGTH] for start in range(0, len(stream), LENGTH)]


def dense_moments(model, rows):
    """XᵀX in float64 for each linear layer, one sequence at a time, by names of the running model."""
    found = {}

    def hook(name):
        def add(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            found[name] = found.get(name, 0) + x.T @ x

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_unbatched_sequences(name, text, tmp_path):
    """Lines of different lengths: a padding token that counted would show."""
    model = build(name)
    moments = calibrate(save(model, tmp_path / name), text, tmp_path / "m.safetensors", options=OPTIONS)
    expected = dense_moments(model, sequences(text, causal=name in CAUSAL))
    left = {row["tensor"]: row["reason"] for row in moments.about["left_out"]}
    tied = {n for n in expected if "not stored" in left.get(n, "") or "stores no tensor" in left.get(n, "")}
    assert set(moments.names) == expected.keys() - tied
    assert tied <= {"lm_head.weight", "cls.predictions.decoder.weight"}
    for stored in moments.names:
        found = moments.get(stored)
        assert found.dtype == torch.float64
        assert torch.equal(found, found.T)
        assert torch.linalg.norm(found - expected[stored]) < 2e-6 * torch.linalg.norm(expected[stored])
    assert moments.about["tokens"] == sum(map(len, sequences(text, causal=name in CAUSAL)))
    assert all("token ids" in reason for n, reason in left.items() if n not in tied)
    assert moments.get("nothing.weight") is None


def test_layers_with_one_input_share_one_matrix(llama, text, tmp_path):
    moments = calibrate(llama, text, tmp_path / "m.safetensors", options=OPTIONS)
    block = "model.layers.1."
    for first, *others in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        for other in others:
            assert moments.about["aliases"][f"{block}{other}.weight"] == f"{block}{first}.weight"
    assert f"{block}self_attn.o_proj.weight" in moments.tensors
    assert f"{block}mlp.down_proj.weight" in moments.tensors
    assert len(moments.tensors) == 2 * 4 + 1


def test_names_are_the_files_and_not_the_running_models(text, tmp_path):
    """A masked model saved without its prefix, and with the old names of layer norms, loads; moments keep its names."""
    folder = save(build("bert"), tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {n.removeprefix("bert."): t.clone() for n, t in build("masked").state_dict().items()}
    state = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in state.items()}
    save_file({n: t for n, t in state.items() if "decoder" not in n}, folder / "model.safetensors", {"format": "pt"})
    moments = calibrate(folder, text, tmp_path / "m.safetensors", options=OPTIONS)
    assert {"encoder.layer.0.output.dense.weight", "cls.predictions.transform.dense.weight"} <= set(moments.tensors)


def test_stacked_experts_are_left_out_and_said_so(text, tmp_path):
    moments = calibrate(save(build("mixtral"), tmp_path / "m"), text, tmp_path / "m.safetensors", options=OPTIONS)
    stacks = [row for row in moments.about["left_out"] if row["reason"] == "a stack of experts in one tensor"]
    assert len(stacks) == 4
    assert not any("experts" in name for name in moments.names)


def test_include_and_exclude(llama, text, tmp_path):
    options = CalibrateOptions(OPTIONS.text, include=r"layers\.0", exclude="mlp")
    moments = calibrate(llama, text, tmp_path / "m.safetensors", options=options)
    assert {name.split(".")[4] for name in moments.names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reasons = {row["reason"] for row in moments.about["left_out"]}
    assert "left out by --include or --exclude" in reasons
    with pytest.raises(CheckpointError, match="Nothing to calibrate"):
        calibrate(llama, text, tmp_path / "n.safetensors", options=CalibrateOptions(OPTIONS.text, include="nothing"))


def test_equal_input_gives_equal_bytes_whatever_the_memory(llama, text, tmp_path):
    """Groups of one layer are the finest; each reads the text once more."""
    files, work = [], []
    for number, memory in enumerate((4 << 30, 4 << 30, 1)):
        file = tmp_path / f"{number}.safetensors"
        options = CalibrateOptions(OPTIONS.text, memory=memory)
        calibrate(llama, text, file, options=options, progress=lambda step: work.append(step.work_total))
        files.append(file.read_bytes())
    assert files[0] == files[1] == files[2]
    assert work[-1] == 9 * work[0]


def test_the_limit_on_tokens(llama, text, tmp_path):
    rows = sequences(text, causal=True)
    options = CalibrateOptions(TextOptions(length=LENGTH, tokens=2 * LENGTH + 3))
    moments = calibrate(llama, text, tmp_path / "m.safetensors", options=options)
    assert moments.about["tokens"] == 2 * LENGTH + 3
    expected = dense_moments(build("llama"), [*rows[:2], rows[2][:3]])["lm_head.weight"]
    assert torch.allclose(moments.get("lm_head.weight"), expected, rtol=1e-5, atol=1e-5)
    bert = save(build("bert"), tmp_path / "bert")
    lengths = [len(row) for row in sequences(text, causal=False)]
    options = CalibrateOptions(TextOptions(length=LENGTH, tokens=sum(lengths[:4]) + 1))
    assert calibrate(bert, text, tmp_path / "b.safetensors", options=options).about["tokens"] == sum(lengths[:4])


def test_a_text_is_read_alike_from_every_format(llama, text, tmp_path):
    lines = [line for line in text.read_text().splitlines() if line]
    files = {
        "a.jsonl": ("body", "\n\n".join(json.dumps({"n": 1, "body": line}) for line in lines)),
        "a.csv": ("body", "n,body\n" + "\n".join(f'1,"{line}"' for line in lines)),
        "a.tsv": ("2", "\n".join(f"1\t{line}" for line in lines)),
        "b.tsv": ("body", "n\tbody\r\n" + "\r\n".join(f"1\t{line}" for line in lines)),
    }
    want = calibrate(llama, text, tmp_path / "m.safetensors", options=OPTIONS)
    for number, (name, (field, content)) in enumerate(files.items()):
        (tmp_path / name).write_bytes(("\ufeff" + content).encode())
        options = CalibrateOptions(TextOptions(field=field, length=LENGTH, batch=3))
        found = calibrate(llama, tmp_path / name, tmp_path / f"{number}.safetensors", options=options)
        assert found.about["text"] != want.about["text"]
        assert all(torch.equal(found.get(name), want.get(name)) for name in want.names)


def test_a_stopped_calibration_goes_on(llama, text, tmp_path):
    """Stopped in its third group, the same command reads the text for the six groups that are missing."""
    options = CalibrateOptions(OPTIONS.text, memory=1)
    whole = tmp_path / "whole.safetensors"
    steps = []
    calibrate(llama, text, whole, options=options, progress=steps.append)

    def stop(step):
        if step.done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, text, out, options=options, progress=stop)
    assert not out.exists()
    rest = []
    calibrate(llama, text, out, options=options, progress=rest.append)
    assert rest[0].work_total == steps[0].work_total * 6 // 9
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_a_killed_calibration_goes_on(llama, text, tmp_path):
    """SIGKILL leaves no time to tidy up."""
    code = (
        "import os, signal; from deltaspec.options import *;"
        "from deltaspec.workflows.extraction.calibrate import calibrate;"
        f"calibrate({str(llama)!r}, {str(text)!r}, {str(tmp_path / 'm.safetensors')!r},"
        f"options=CalibrateOptions(TextOptions(length={LENGTH}, batch=3), memory=1),"
        "progress=lambda step: step.done == 5 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "m.safetensors").exists()
    options = CalibrateOptions(OPTIONS.text, memory=1)
    rest = []
    found = calibrate(llama, text, tmp_path / "m.safetensors", options=options, progress=rest.append)
    assert rest[0].done == 5
    want = calibrate(llama, text, tmp_path / "n.safetensors", options=options)
    assert found.path.read_bytes() == want.path.read_bytes()


def test_other_text_does_not_go_on_with_what_was_begun(llama, text, tmp_path):
    options, out = CalibrateOptions(OPTIONS.text, memory=1), tmp_path / "m.safetensors"

    def stop(step):
        if step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, text, out, options=options, progress=stop)
    other = write_text(tmp_path / "other.txt", seed=5)
    found = calibrate(llama, other, out, options=options)
    want = calibrate(llama, other, tmp_path / "n.safetensors", options=options)
    assert all(torch.equal(found.get(name), want.get(name)) for name in want.names)


def test_what_is_there_is_replaced_only_on_demand(llama, text, tmp_path):
    out = tmp_path / "m.safetensors"
    calibrate(llama, text, out, options=OPTIONS)
    with pytest.raises(RunError, match="--overwrite"):
        calibrate(llama, text, out, options=OPTIONS)
    other = write_text(tmp_path / "other.txt", seed=5)
    calibrate(llama, other, out, options=OPTIONS, overwrite=True)
    assert open_moments(out).about["text"]["name"] == "other.txt"


def test_nan_is_placed_by_layer_and_line(tmp_path):
    """One word has a broken embedding; it stands on the fifth line, the third of its length."""
    model = build("bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[VOCAB["hat"]] = torch.nan
    text = tmp_path / "text.txt"
    text.write_text("the cat sat\nthe dog sat\n\na dog\nthe hat ran\nthe dog saw\n")
    with pytest.raises(NumericalError, match=r"'encoder\.layer\.0\.attention\.self\.query\.weight'.*text line 5\b"):
        calibrate(save(model, tmp_path / "m"), text, tmp_path / "m.safetensors", options=OPTIONS)
    assert not (tmp_path / "m.safetensors").exists()


def refused(folder, text, tmp_path, *, field="text"):
    with pytest.raises(DeltaspecError) as caught:
        calibrate(folder, text, tmp_path / "m.safetensors", options=CalibrateOptions(TextOptions(field=field)))
    said = str(caught.value)
    assert "\n" not in said
    assert said.rstrip().endswith(".")
    assert not (tmp_path / "m.safetensors").exists()
    return said


TEXTS = {
    "no such file": ("missing.txt", None, "text", "check the path"),
    "empty": ("t.txt", "\n \n", "text", "no text in it"),
    "another kind": ("t.parquet", "x", "text", "expected a file that ends in .txt"),
    "not UTF-8": ("t.txt", b"caf\xe9\n", "text", "UTF-8"),
    "field missing": ("t.jsonl", '{"body": "the cat"}', "text", "pass --field"),
    "no text there": ("t.jsonl", '{"text": 3}', "text", "pass --field"),
    "not JSON": ("t.jsonl", '{"text": "a"}\n{', "text", "line 2"),
    "not objects": ("t.jsonl", "[1]", "text", "Line 1"),
    "column missing": ("t.csv", "n,body\n1,the cat", "text", "no column 'text'"),
    "short row": ("t.tsv", "1\tthe cat\n2", "2", "Line 2"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_cannot_be_read(case, llama, tmp_path):
    name, content, field, said = TEXTS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(llama, tmp_path / name, tmp_path, field=field)


def edit(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def test_a_model_that_cannot_be_run(llama, text, tmp_path):
    edit(llama, num_hidden_layers=3)
    assert "needs 'model.layers.2" in refused(llama, text, tmp_path)
    edit(llama, num_hidden_layers=2, architectures=["NoSuchModel"])
    assert "no class 'NoSuchModel'" in refused(llama, text, tmp_path)
    edit(llama, architectures=["AutoConfig"])
    assert "no class 'AutoConfig'" in refused(llama, text, tmp_path)
    edit(llama, model_type="strange", auto_map={"AutoConfig": "evil.Config"})
    (llama / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "Cannot read the config" in refused(llama, text, tmp_path)
    assert not (tmp_path / "ran").exists()
    (llama / "config.json").unlink()
    assert "no config.json" in refused(llama, text, tmp_path)


def test_a_tokenizer_that_does_not_belong(llama, text, tmp_path):
    write_tokenizer(llama, causal=True, extra=("zebra",))
    text.write_text("the cat\nthe zebra sat\n")
    assert f"id {len(VOCAB)} on text line 1" in refused(llama, text, tmp_path)
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "Cannot read the tokenizer" in refused(llama, text, tmp_path)


def test_without_transformers(llama, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"deltaspec\[train\]"):
        calibrate(llama, text, tmp_path / "m.safetensors")


WRONG = {"tokens": 0, "length": 1, "batch": 0, "device": "cuda:0,cuda:1"}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_named(name):
    with pytest.raises(OptionError, match=f"--{name}"):
        TextOptions(**{name: WRONG[name]})
    with pytest.raises(OptionError, match="--dtype"):
        CalibrateOptions(dtype="int8")
    with pytest.raises(OptionError, match="--memory"):
        CalibrateOptions(memory=0)
    with pytest.raises(OptionError, match="--include"):
        CalibrateOptions(include="(")


def test_batches_hold_sequences_of_one_length(tmp_path):
    class Letters:
        model_max_length, eos_token_id = 10**30, None

        def __call__(self, text, *, truncation=False, max_length=None):
            return {"input_ids": [ord(letter) for letter in text[:max_length]]}

    path = tmp_path / "text.txt"
    path.write_text("aaaa\nbb\ncccc\nbb\ndddddddd\n")
    batches = make_batches(Text(path, TextOptions(length=6, batch=1)), Letters(), Intake(packed=False, distinct=True))
    assert [batch.ids.shape[1] for batch in batches] == [2, 4, 4, 6]
    assert [batch.lines for batch in batches] == [(2,), (1,), (3,), (5,)]
    assert all(a.ids.shape[1] <= b.ids.shape[1] for a, b in pairwise(batches))


def test_moments_never_replace_the_weights_that_they_come_from(llama, text):
    weights = (llama / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="a file of an input"):
        calibrate(llama, text, llama / "model.safetensors", options=OPTIONS, overwrite=True)
    assert (llama / "model.safetensors").read_bytes() == weights
