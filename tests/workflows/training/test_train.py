"""Trainings of tiny models: what they leave behind, against PEFT and transformers, and how they go on."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from deltaspec.errors import NumericalError, OptionError, RunError
from deltaspec.options import DataOptions, TargetOptions
from deltaspec.workflows.analysis.analyze import analyze
from tests.tiny_models import build, save
from tests.workflows.training.train_case import CLASSES, held_out, read_bytes, read_lines, run, write_case

LORA = {"rank": 4, "dropout": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "bert", "llama", "tied")


class Stop:
    """Ctrl-C after a step."""

    def __init__(self, step):
        self.step, self.seen = step, []

    def __call__(self, tick):
        self.seen.append(tick.step)
        if tick.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [("bert", "lora", LORA), ("llama", "lora", LORA | {"bias": "all"}), ("bert", "full", {}), ("tied", "full", {})],
)
def test_a_stopped_training_goes_on_bit_for_bit(root, tmp_path, model, method, options):
    """Mid-epoch, under accumulation and dropout: weights, losses and evaluations of one that never stopped."""
    given = {"method": method, "method_options": options, "run": {"checkpoint_every": 2, "evaluate_every": 3}}
    whole = run(root, tmp_path / "whole", model, **given)
    for step in (1, 5):
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "stopped", model, progress=Stop(step), **given)
    rest = Stop(0)
    report = run(root, tmp_path / "stopped", model, progress=rest, **given)
    assert rest.seen == [5, 6]  # the checkpoint of step 4 was the last
    assert read_bytes(tmp_path / "stopped/final") == read_bytes(tmp_path / "whole/final")
    assert read_lines(tmp_path / "stopped") == read_lines(tmp_path / "whole")
    for name in ("learned", "forgotten", "steps"):
        assert report["results"][name] == whole["results"][name]
    other = run(root, tmp_path / "seed", model, **given, loop={"seed": 1})
    assert other["results"]["learned"] != whole["results"]["learned"]


def test_a_checkpoint_is_whole_and_the_newest_alone_can_be_resumed(root, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(root, out, run={"checkpoint_every": 2}, progress=Stop(5))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert [p.parent.name for p in out.glob("checkpoints/*/resume")] == ["step-00000004"]
    assert json.loads((out / "train.json").read_text())["finished"] is False
    (out / "checkpoints/step-00000006.999.tmp").mkdir()  # as a kill leaves it
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    run(root, out, run={"checkpoint_every": 2})
    assert not list(out.rglob("*.tmp"))
    assert not list(out.rglob("resume"))
    assert [line["step"] for line in read_lines(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_finished_training_is_not_repeated_and_another_is_refused(root, tmp_path):
    out, seen = tmp_path / "out", []
    first = run(root, out)
    assert run(root, out, progress=seen.append) == first
    assert not seen
    with pytest.raises(RunError, match=r"loop.lr was 0.01, now 0.02.*--overwrite"):
        run(root, out, loop={"lr": 2e-2})
    with pytest.raises(RunError, match=r"method_options.rank was 8, now 2"):
        run(root, out, method_options={"rank": 2})
    (out / "mine.txt").write_text("kept")
    assert run(root, out, loop={"lr": 2e-2}, overwrite=True)["loop"]["lr"] == 2e-2
    assert (out / "mine.txt").read_text() == "kept"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    for overwrite in (False, True):
        with pytest.raises(RunError, match="no training folder"):
            run(root, tmp_path / "mine", overwrite=overwrite)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks for it
def test_an_adapter_and_its_head_load_into_peft(root, tmp_path):
    report = run(root, tmp_path / "out", targets=TargetOptions("attention"), method_options=LORA)
    config = json.loads((tmp_path / "out/final/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(root / "bert", num_labels=2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out/final").eval()
    learned = report["results"]["learned"]
    assert held_out(root, "bert", loaded) == pytest.approx(learned["loss"], rel=1e-5)
    assert learned["loss"] < learned["before"]["loss"] and learned["accuracy"] > learned["before"]["accuracy"]
    lora = 2 * 4 * 4 * (16 + 16)  # blocks · q, k, v, o · r · (d_out + d_in)
    assert report["counts"]["trainable"] == lora and report["counts"]["head"] == 2 * 16 + 2


@pytest.mark.parametrize(
    ("model", "method", "given"),
    [
        ("bert", "full", {}),
        ("llama", "last_layers", {"method_options": {"blocks": 1}}),
        ("llama", "lora", {"run": {"save": "full"}}),
        ("bert", "lora", {"run": {"save": "full"}, "method_options": LORA | {"dora": True, "bias": "all"}}),
    ],
)
def test_a_whole_checkpoint_is_what_was_trained(root, tmp_path, model, method, given):
    """transformers alone runs it to the same loss, and analyze reads it against the base."""
    report = run(root, tmp_path / "out", model, method=method, **given)
    cls = transformers.AutoModelForSequenceClassification if model == "bert" else transformers.AutoModelForCausalLM
    loaded, info = cls.from_pretrained(tmp_path / "out/final", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert held_out(root, model, loaded) == pytest.approx(report["results"]["learned"]["loss"], rel=1e-5)
    if model == "bert":
        assert loaded.config.id2label == {0: "neg", 1: "pos"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/final")
    assert (
        tokenizer("the cat")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(root / model)("the cat")["input_ids"]
    )
    analyzed = analyze(root / model, tmp_path / "out/final", tmp_path / "run")
    assert not analyzed.failures and not analyzed.missing
    changed = {record.key.tensor for record in analyzed.records if record.metrics["relative_norm"] > 0}
    assert changed
    if method == "last_layers":
        assert all(".layers.1." in name or "lm_head" in name for name in changed)


def test_a_head_that_is_there_goes_on_and_a_narrow_one_is_trained_wide(root, tmp_path):
    """A stored head of the same classes is kept, one of others is drawn; under bf16 it is float32."""
    model = build("classifier", num_labels=2)
    model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    save(model.bfloat16(), tmp_path / "stored")
    stored = load_file(tmp_path / "stored/model.safetensors")["classifier.weight"].float()
    for data, same in (("data.csv", True), ("other.csv", False)):
        out = tmp_path / data
        run(tmp_path, out, "stored", data=root / data, loop={"lr": 1e-12, "steps": 1})
        head = load_file(out / "final/adapter_model.safetensors")["base_model.model.classifier.weight"]
        assert head.dtype == torch.float32
        assert (head.shape == stored.shape and torch.allclose(head, stored, atol=1e-6)) is same


def test_forgetting_is_measured_before_and_after(root, tmp_path):
    report = run(root, tmp_path / "classes", forget=root / "other.csv", forget_data=CLASSES)
    lost = report["results"]["forgotten"]
    assert lost["metric"] == "accuracy" and 0 <= lost["after"] <= 1 and lost["before"] > 1 / 3
    report = run(root, tmp_path / "text", "llama", forget=root / "text.txt")
    lost = report["results"]["forgotten"]
    assert lost["metric"] == "perplexity" and lost["after"] < lost["before"]  # it is what was trained on


def test_checkpointed_gradients_are_the_same(root, tmp_path):
    for name, again in (("plain", False), ("again", True)):
        run(root, tmp_path / name, "llama", method_options=LORA, run={"gradient_checkpointing": again})
    plain, again = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("plain", "again"))
    for name, tensor in plain.items():
        assert torch.allclose(tensor, again[name], atol=1e-6)


def test_bf16_computes_otherwise_and_stores_the_same(root, tmp_path):
    reports = [run(root, tmp_path / name, "llama", run={"precision": name}) for name in ("no", "bf16")]
    losses = [report["results"]["learned"]["loss"] for report in reports]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert load_file(tmp_path / "bf16/final/adapter_model.safetensors").popitem()[1].dtype == torch.float32
    with pytest.raises(OptionError, match="--precision fp16 needs a CUDA device"):
        run(root, tmp_path / "fp16", run={"precision": "fp16"})


def test_the_best_of_several_rates(root, tmp_path):
    """One that diverges does not end the others; stopped in the second, it goes on there."""
    out, rates = tmp_path / "out", [1e-4, 2e-2, 1e30]
    stop = Stop(6)
    with pytest.raises(KeyboardInterrupt):
        run(root, out, method="full", rates=rates, progress=stop)
    report = run(root, out, method="full", rates=rates)
    found = {row["lr"]: row for row in report["runs"]}
    assert list(found) == rates and report["finished"] and report["best"] == "lr-0.02"
    losses = [found[rate]["results"]["learned"]["loss"] for rate in rates[:2]]
    assert losses[1] < losses[0]
    assert "Training stopped at step" in found[1e30]["failed"] and "lower --lr" in found[1e30]["failed"]
    assert json.loads((out / "lr-0.02/train.json").read_text())["loop"]["lr"] == 0.02
    assert json.loads((out / "train.json").read_text()) == report
    with pytest.raises(OptionError, match="best is told by held-out data"):
        run(root, tmp_path / "none", rates=rates, data_options=DataOptions(holdout=0))


def test_what_diverges_keeps_the_last_checkpoint(root, tmp_path):
    given = {"method": "full", "loop": {"lr": 1e12, "schedule": "constant", "warmup": 0, "steps": 40}}
    with pytest.raises(NumericalError, match=r"Training stopped at step (\d+): .*try a lower --lr") as caught:
        run(root, tmp_path / "out", run={"checkpoint_every": 1}, **given)
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    last = sorted((tmp_path / "out/checkpoints").iterdir())[-1] if step > 1 else None
    if last is not None:
        assert last.name == f"step-{step - 1:08}"
        assert all(bool(torch.isfinite(t).all()) for t in load_file(last / "model.safetensors").values())
