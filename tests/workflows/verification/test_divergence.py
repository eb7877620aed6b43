"""Divergences against KL computed from two running models, one sequence at a time; adapters against PEFT."""

from __future__ import annotations

import gc
import json
import warnings
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaspec.errors import DeltaspecError, RunError
from deltaspec.options import TextOptions
from deltaspec.workflows.shared.text_batches import Text
from deltaspec.workflows.verification import divergence as workflow
from deltaspec.workflows.verification.divergence import divergence
from tests.tiny_models import VOCAB, build, perturb, save, write_text
from tests.workflows.extraction.test_calibrate import LENGTH, edit, sequences

OPTIONS = TextOptions(length=LENGTH, batch=3)
TARGETS = {
    "llama": ["q_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "dense"],
    "masked": ["query", "dense"],
    "classifier": ["query", "dense", "classifier"],
    "mixtral": ["q_proj", "o_proj"],
    "t5": ["q", "wo"],
}


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


def adapt(name, folder, **settings):
    """A PEFT model whose factors are all perturbed, saved."""
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[name], **fan, **settings}
    generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: tied embeddings, lora_B.bias, what transformers deprecates
        model = peft.get_peft_model(build(name), peft.LoraConfig(**settings))
        for part, parameter in model.named_parameters():
            if "lora_" in part or "modules_to_save" in part:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
    return model.eval()


def outputs(model, rows):
    """Outputs in float64, one sequence at a time."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            out = model(input_ids=ids, **given)
            found.append((out.logits.flatten(0, -2) if "logits" in out else out.last_hidden_state[0]).double())
    return found


def kl_and_top1(tuned, other):
    """Mean KL(tuned ‖ other) by its definition, and how often the first choice is the same."""
    p, q = (torch.cat(x).softmax(1) for x in (tuned, other))
    agree = (p.argmax(1) == q.argmax(1)).double().mean()
    return float((p * (p / q).log()).sum(1).mean()), float(agree)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "bert"])
def test_divergences_are_those_of_the_running_models(name, text, tmp_path):
    base, tuned = build(name), perturb(build(name))
    folders = [save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), tmp_path / "adapter"]
    adapted = adapt(name, folders[2])
    found = divergence(*folders, Text(text, OPTIONS))
    causal = name in ("llama", "gpt2", "mixtral")
    want = outputs(tuned, rows := sequences(text, causal=causal))
    for model, kl, top1 in (
        (base, found.kl_base, found.top1_base),
        (adapted, found.kl_adapter, found.top1_adapter),
    ):
        assert (kl, top1) == pytest.approx(kl_and_top1(want, outputs(model, rows)), rel=1e-4)
    assert found.kl_base != pytest.approx(found.kl_adapter, rel=1e-2)
    assert found.tokens == sum(map(len, rows))
    assert found.cases == (len(rows) if name == "classifier" else found.tokens)
    assert type(base).__name__ in found.measure
    assert found.hidden_base is found.hidden_adapter is None


def test_without_a_head_texts_are_told_apart(text, tmp_path):
    """For each text: softmax over the others of cosine / 0.05 of mean hidden states, as sentence embeddings train."""
    base, tuned = build("bert"), perturb(build("bert"), size=0.02)
    folders = [save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), tmp_path / "adapter"]
    adapted = adapt("bert", folders[2])
    text.write_text(text.read_text() + text.read_text().splitlines()[0] + "\n")  # a text twice counts once
    found = divergence(*folders, Text(text, OPTIONS))
    rows = list(dict.fromkeys(map(tuple, sequences(text, causal=False))))
    want = outputs(tuned, rows)
    for model, kl, top1, hidden in (
        (base, found.kl_base, found.top1_base, found.hidden_base),
        (adapted, found.kl_adapter, found.top1_adapter, found.hidden_adapter),
    ):
        have = outputs(model, rows)
        logits = []
        for states in (want, have):
            means = torch.stack([state.mean(0) / state.mean(0).norm() for state in states])
            others = [[means[i] @ means[j] / 0.05 for j in range(len(rows)) if j != i] for i in range(len(rows))]
            logits.append([torch.tensor(others)])
        assert (kl, top1) == pytest.approx(kl_and_top1(*logits), rel=1e-4)
        change = torch.cat(have) - torch.cat(want)
        assert hidden == pytest.approx(float(change.norm() / torch.cat(want).norm()), rel=1e-4)
    assert found.cases == len(rows)
    assert "cosine" in found.measure


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("classifier", {"modules_to_save": ["classifier"], "target_modules": ["query"]}),
        ("classifier", {"lora_bias": True}),
        ("llama", {"modules_to_save": ["norm", "embed_tokens"], "target_modules": ["q_proj"], "use_rslora": True}),
    ],
)
def test_biases_and_whole_tensors_are_added_too(name, settings, text, tmp_path):
    base, tuned = build(name), perturb(build(name))
    folders = [save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned"), tmp_path / "adapter"]
    adapted = adapt(name, folders[2], **settings)
    found = divergence(*folders, Text(text, OPTIONS))
    rows = sequences(text, causal=name == "llama")
    expected = kl_and_top1(outputs(tuned, rows), outputs(adapted, rows))
    assert (found.kl_adapter, found.top1_adapter) == pytest.approx(expected, rel=1e-4)


def write_adapter(folder, factors, *, rank, **config):
    """A PEFT folder by hand."""
    folder.mkdir()
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["x"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in factors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_an_adapter_that_holds_all_of_the_delta_leaves_nothing(text, tmp_path):
    """B = ΔW and A = 1 for each matrix of the blocks, which is all that was tuned."""
    base, tuned = build("llama"), build("llama")
    perturb(tuned.model.layers)
    factors = {}
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        module = name.removesuffix(".weight")
        if "layers" in name and before.ndim == 2:
            padded = torch.zeros(len(before), 24)
            padded[:, : before.shape[1]] = (after - before).detach()
            factors |= {f"{module}.lora_B.weight": padded, f"{module}.lora_A.weight": torch.eye(24, before.shape[1])}
        elif "layers" in name:
            factors[name] = after.detach()
    folders = [save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")]
    found = divergence(*folders, write_adapter(tmp_path / "a", factors, rank=24), Text(text, OPTIONS))
    assert found.kl_base > 1e-2
    assert found.kl_adapter < 1e-10
    assert found.top1_adapter == 1.0


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_vocabulary_that_grew(name, text, tmp_path):
    """The base is compared over the tokens it has; base + adapter over all of them."""
    base, tuned = build(name), perturb(build(name))
    torch.manual_seed(0)
    tuned.resize_token_embeddings(len(VOCAB) + 3)
    folders = [save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")]
    grown = load_file(folders[1] / "model.safetensors")
    found = divergence(*folders, write_adapter(tmp_path / "a", grown, rank=1), Text(text, OPTIONS))
    rows = sequences(text, causal=True)
    shared = [[x[:, : len(VOCAB)] for x in outputs(model, rows)] for model in (tuned, base)]
    assert (found.kl_base, found.top1_base) == pytest.approx(kl_and_top1(*shared), rel=1e-4)
    assert found.kl_adapter < 1e-10


def test_a_masked_head_that_the_config_does_not_name_is_used(text, tmp_path):
    """Encoders are often published as BertModel with their language-model head still in the file."""
    folders = [save(build("masked"), tmp_path / "base"), save(perturb(build("masked")), tmp_path / "tuned")]
    adapt("masked", tmp_path / "a")
    named = divergence(*folders, tmp_path / "a", Text(text, OPTIONS))
    for folder in folders:
        edit(folder, architectures=["BertModel"])
    assert divergence(*folders, tmp_path / "a", Text(text, OPTIONS)) == named


def test_a_base_without_the_classifier_is_compared_by_hidden_states(text, tmp_path):
    base, tuned = build("bert"), build("classifier")
    tuned.bert.load_state_dict(perturb(build("bert")).state_dict())
    folders = [save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")]
    adapt("bert", tmp_path / "a")
    found = divergence(*folders, tmp_path / "a", Text(text, OPTIONS))
    assert "BertModel, no head" in found.measure
    assert found.hidden_base > 0


def test_one_model_at_a_time_is_in_memory(text, tmp_path, monkeypatch):
    folders = [save(build("llama"), tmp_path / "base"), save(perturb(build("llama")), tmp_path / "tuned")]
    adapt("llama", tmp_path / "a")
    alive, load = [], workflow.load_model

    def watch(*args, **given):
        gc.collect()
        assert not any(model() for model in alive)
        model = load(*args, **given)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(workflow, "load_model", watch)
    said = []
    divergence(*folders, tmp_path / "a", Text(text, OPTIONS), progress=said.append)
    assert len(alive) == len(said) == 3


def refused(base, tuned, adapter, text, *, match, kind=DeltaspecError):
    with pytest.raises(kind, match=match) as caught:
        divergence(base, tuned, adapter, Text(text, OPTIONS))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_compared_is_refused(text, tmp_path, monkeypatch):
    base, tuned = save(build("bert"), tmp_path / "base"), save(perturb(build("bert")), tmp_path / "tuned")
    adapt("bert", tmp_path / "a")
    refused(base, tuned, tuned, text, match="is no adapter")
    refused(base, tmp_path / "a", tmp_path / "a", text, match="it is an adapter")
    refused(
        save(build("llama"), tmp_path / "llama"),
        tuned,
        tmp_path / "a",
        text,
        match="base is of type 'llama', the fine-tune 'bert'",
    )
    wide = save(build("bert", hidden_size=32), tmp_path / "wide")
    refused(base, wide, tmp_path / "a", text, match="differ in size: 16, 32")
    few = tmp_path / "few.txt"
    few.write_text("the cat\nthe dog\nthe cat\n")
    refused(base, tuned, tmp_path / "a", few, match="has 2 different sequences")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    refused(base, tuned, tmp_path / "a", text, match="No space left on device.*TMPDIR", kind=RunError)


def test_one_output_is_no_distribution(text, tmp_path):
    one = [save(build("classifier", num_labels=1, seed=seed), tmp_path / f"{seed}") for seed in (0, 1)]
    adapt("classifier", tmp_path / "a", target_modules=["query"])
    refused(*one, tmp_path / "a", text, match="not defined for regression")


def test_nan_is_placed(text, tmp_path):
    tuned = build("masked")
    with torch.no_grad():
        tuned.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    folders = [save(build("masked"), tmp_path / "base"), save(tuned, tmp_path / "tuned")]
    adapt("masked", tmp_path / "a")
    refused(*folders, tmp_path / "a", text, match="tuned' are NaN or infinite near text line")
