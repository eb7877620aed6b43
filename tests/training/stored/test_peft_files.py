"""Adapter folders of every method: to PEFT and back, whole modules beside them, and files that are wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.options.training import TargetOptions
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.attachment import Attachment, freeze
from deltaspec.training.sites.model_sites import list_modules
from deltaspec.training.sites.targets import choose_sites
from deltaspec.training.stored.adapter_format import adapter_config
from deltaspec.workflows.training.saved_adapters import load_adapter, save_adapter
from tests import tiny_models
from tests.training.methods.test_activation_methods import CHECKPOINTED, RENAMED, peft_logits

IDS = torch.tensor([[5, 7, 9, 11, 6, 8], [20, 4, 10, 3, 12, 14]])
SMALL = {"rank": 2, "vectors": 12, "vector_length": 8, "bottleneck": 4, "reduction": 4, "factors": 2, "tokens": 3}


def attach(model: Any, method: str, targets: str = "all", *, split: bool = False, **options: Any) -> Attachment:
    freeze(model)
    line = METHODS[method]
    small = {name: value for name, value in SMALL.items() if name in line.options.__dataclass_fields__}
    sites = choose_sites(model, TargetOptions(targets, split=split)) if line.sites else []
    found = line.attach(model, sites, line.options(**{**small, **options}), name="mine", seed=0)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in found.trained().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def output(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits
    return logits.detach()


def in_peft(folder: Path, model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder)


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"dora": True}, {"lora_bias": True}], ids=["plain", "rslora", "dora", "bias"]
)
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "k_proj,mlp", "attention"])
def test_parts_of_a_fused_matrix_become_one_adapter_of_it(
    targets: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_models.build("gpt2")
    plain = output(model)
    attachment = attach(model, "lora", targets, split=True, **options)
    assert not all(site.whole for site in attachment.sites)
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    expected = output(model)
    assert apart(expected, plain) > 1e-2
    assert apart(output(in_peft(tmp_path, tiny_models.build("gpt2"))), expected) <= 1e-5
    again = tiny_models.build("gpt2")
    assert all(site.whole for site in load_adapter(again, tmp_path).sites)
    assert apart(output(again), expected) <= 1e-5
    stored = load_file(tmp_path / "adapter_model.safetensors")
    lora_B = stored["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    kept = {"q_proj,v_proj": [True, False, True], "k_proj,mlp": [False, True, False], "attention": [True] * 3}[targets]
    assert [bool(rows.any()) for rows in lora_B.chunk(3)] == kept
    assert lora_B.shape == (48, 2 * sum(kept))


MIXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora and biases": {"dora": True, "bias": "lora_only"},
    "pissa": {"init": "pissa", "rslora": True},
    "lora_bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
}


@pytest.mark.parametrize("patterns", [False, True], ids=["alike", "patterns"])
@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_mixtures_of_parts_whole_sites_embeddings_and_patterns_come_back(
    family: str, options: dict[str, Any], patterns: bool, tmp_path: Path
) -> None:
    """Ranks and scalings that differ between parts of one matrix, whole ones and an embedding: the same logits."""
    model = tiny_models.build(family)
    plain = output(model)
    targets = "q_proj,v_proj" + ("" if "lora_bias" in options else ",embed") + patterns * ",down_proj"
    own = ((1, 3.0), (3, 5.0), (2, 9.0))
    sites = choose_sites(model, TargetOptions(targets))
    single = {site.name: own[n % 3] for n, site in enumerate(sites) if n % 4 != 3} if patterns else {}
    attachment = attach(model, "lora", targets, alpha=7.0, patterns=single, **options)
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    expected = output(model)
    assert apart(expected, plain) > 1e-2
    assert apart(output(in_peft(tmp_path, tiny_models.build(family))), expected) <= 1e-5
    again = tiny_models.build(family)
    assert all(site.whole for site in load_adapter(again, tmp_path).sites)
    assert apart(output(again), expected) <= 1e-5


@pytest.mark.filterwarnings(CHECKPOINTED, RENAMED)
@pytest.mark.parametrize("family", ["llama", "classifier"])
@pytest.mark.parametrize("method", [name for name, line in METHODS.items() if line.space != "base"])
def test_every_method_comes_back_with_its_head(method: str, family: str, tmp_path: Path) -> None:
    model = tiny_models.build(family)
    attachment = attach(model, method)
    head = model.get_submodule("lm_head" if family == "llama" else "classifier")
    name = "lm_head" if family == "llama" else "classifier"
    with torch.no_grad():
        head.weight += 0.5
    heads = {f"{name}.{leaf}": parameter.detach() for leaf, parameter in head.named_parameters()}
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    save_adapter(tmp_path, attachment, base="here", task_type=task, heads=heads)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [name] and config["base_model_name_or_path"] == "here"
    again = tiny_models.build(family)
    back = load_adapter(again, tmp_path, name="again")
    assert apart(output(again), output(model)) <= 1e-6
    assert back.method == method and back.state().keys() == attachment.state().keys()
    if METHODS[method].peft and method != "prompt":
        theirs = in_peft(tmp_path, tiny_models.build(family)).eval()
        assert apart(peft_logits(theirs, None, IDS).detach(), output(model)) <= 1e-5


def test_a_head_is_saved_as_the_largest_module_that_is_all_there() -> None:
    model = tiny_models.build("classifier")
    attachment = attach(model, "lora", "q_proj")
    inner = [name for name, _ in model.named_parameters() if name.startswith(("bert.pooler", "classifier"))]
    inner = [name for name in inner if "lora" not in name]
    config = adapter_config(attachment, base="here", task_type="SEQ_CLS", heads=inner)
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    assert adapter_config(attachment, base="", task_type=None, heads=["classifier"])["modules_to_save"] == [
        "classifier"
    ]
    json.dumps(config)


def test_a_tied_head_is_untied_before_it_gets_values_of_its_own(tmp_path: Path) -> None:
    model = tiny_models.build("tied")
    attachment = attach(model, "lora", "q_proj")
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={"lm_head.weight": torch.ones(25, 16)})
    again = tiny_models.build("tied")
    before = again.get_input_embeddings().weight.detach().clone()
    load_adapter(again, tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, before)
    assert torch.equal(again.lm_head.weight, torch.ones(25, 16))


SHARED: dict[str, Callable[..., Any]] = {
    "vera": lambda **given: peft.VeraConfig(r=4, **given),
    "vblora": lambda **given: peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=8, **given),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("target", ["v_proj", "down_proj"], ids=["inside", "elsewhere"])
@pytest.mark.parametrize("method", SHARED)
def test_biases_that_peft_trains_beside_shared_methods_are_refused(method: str, target: str, tmp_path: Path) -> None:
    """Not copied into the base, where detach() would leave them and delta() would not know of them."""
    own = peft.get_peft_model(
        tiny_models.build("llama", attention_bias=True), SHARED[method](target_modules=[target], bias="all")
    )
    own.save_pretrained(tmp_path)
    assert any(name.endswith("bias") for name in load_file(tmp_path / "adapter_model.safetensors"))
    model = tiny_models.build("llama", attention_bias=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has 'model\.layers\.0.*bias', a bias of its base, .* bias 'all'\)"):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    bare = peft.get_peft_model(tiny_models.build("llama"), SHARED[method](target_modules=[target], bias="all"))
    bare.save_pretrained(tmp_path / "bare")
    model = tiny_models.build("llama")
    load_adapter(model, tmp_path / "bare")
    assert apart(output(model), output(bare.eval())) <= 1e-5


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WRONG: dict[str, tuple[str, Change, str]] = {
    "unknown type": ("lora", lambda c, t: c.update(peft_type="OFT"), "peft_type is 'OFT'"),
    "no type": ("lora", lambda c, t: c.pop("peft_type"), "peft_type is None"),
    "odd type": ("lora", lambda c, t: c.update(peft_type=["LORA"]), r"peft_type is \['LORA'\]"),
    "unknown method": ("tied", lambda c, t: c.update(method="x"), "peft_type is 'DELTASPEC_TIED'"),
    "missing field": ("lora", lambda c, t: c.pop("r"), "lacks 'r'"),
    "missing option": ("tied", lambda c, t: c.pop("rank"), "lacks 'rank'"),
    "text for a number": ("tied", lambda c, t: c.update(rank="3"), "makes no sense"),
    "null": ("vera", lambda c, t: c.update(r=None), "makes no sense"),
    "huge rank": ("vera", lambda c, t: c.update(r=10**9), "says rank 1000000000"),
    "huge own rank": ("tied", lambda c, t: c.update(rank=10**9), "says rank 1000000000"),
    "huge bank": ("vblora", lambda c, t: c.update(num_vectors=10**9), "num_vectors"),
    "negative rank": ("vera", lambda c, t: c.update(r=-1), "makes no sense"),
    "no tensors": ("lora", lambda c, t: t.clear(), "holds no tensors"),
    "no layers": ("vera", lambda c, t: [t.pop(k) for k in list(t) if "lambda" in k], "nothing that acts at a layer"),
    "unknown path": ("lora", lambda c, t: t.update({A.replace("q_proj", "z_proj"): t.pop(A)}), "z_proj.lora_A.weight"),
    "missing tensor": ("lora", lambda c, t: t.pop(A), "q_proj.lora_A.weight"),
    "unknown tensor": ("lora", lambda c, t: t.update({A + "2": t[A].clone()}), "unknown tensor"),
    "wrong shape": ("lora", lambda c, t: t.update({A: t[A][:, :-1].contiguous()}), r"has shape \(2, 15\)"),
    "wrong head": (
        "lora",
        lambda c, t: t.update({"base_model.model.lm_head.weight": torch.ones(3, 16)}),
        r"has shape \(3, 16\), expected \(25, 16\)",
    ),
    "other family": (
        "lora",
        lambda c, t: _rename(t, "model.layers", "transformer.h"),
        "no linear, Conv1D or embedding",
    ),
}


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_clear_error_and_leaves_the_model_alone(case: str, tmp_path: Path) -> None:
    method, change, message = WRONG[case]
    attachment = attach(tiny_models.build("llama"), method)
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(config, tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = tiny_models.build("llama")
    before = output(model)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(output(model), before)
    assert not any(type(module).__name__ == "Adapted" for module in model.modules())
    assert len(dict(list_modules(model))) == len(list(model.modules()))


@pytest.mark.parametrize("method", [name for name, line in METHODS.items() if line.peft and name != "prompt"])
def test_peft_knows_every_field(method: str, tmp_path: Path) -> None:
    attachment = attach(tiny_models.build("llama"), method)
    save_adapter(tmp_path, attachment, base="here", task_type="CAUSAL_LM", heads={})
    peft.PeftConfig.from_pretrained(tmp_path)  # warnings are errors


@pytest.mark.parametrize("method", ["lora", "vera", "vblora"])
def test_peft_adapts_no_module_whose_path_ends_alike(method: str, tmp_path: Path) -> None:
    def build() -> Any:
        model = tiny_models.build("llama")
        model.add_module("draft", torch.nn.ModuleDict({"model": tiny_models.build("llama").model}))
        return model

    model = build()
    sites = [s for s in choose_sites(model, TargetOptions("q_proj")) if s.path.startswith("model.")]
    line = METHODS[method]
    small = {name: value for name, value in SMALL.items() if name in line.options.__dataclass_fields__}
    attachment = line.attach(model, sites, line.options(**small), name="mine", seed=0)
    save_adapter(tmp_path, attachment, base="here", task_type=None, heads={})
    names = [name for name, _ in in_peft(tmp_path, build()).named_parameters() if name.endswith(".base_layer.weight")]
    assert [name.removeprefix("base_model.model.") for name in names] == [f"{s.path}.base_layer.weight" for s in sites]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_new_modules_are_in_the_mode_of_those_they_wrap(method: str, training: bool, tmp_path: Path) -> None:
    """Dropout of an adapter on a model in eval mode would make its outputs random."""
    first = attach(tiny_models.build("llama"), method, "q_proj", dropout=0.5)
    save_adapter(tmp_path, first, base="here", task_type=None, heads={})
    model = tiny_models.build("llama").train(training)
    load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, name="second")
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(output(model), output(model)) is not training


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    whole = tiny_models.save(model, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"is a whole checkpoint: open it with transformers' from_pretrained\.$"):
        load_adapter(model, whole)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match="no such|expected a folder"):
        load_adapter(model, tmp_path / "missing")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="convert it to safetensors"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_adapter(model, tmp_path)


def test_an_older_adapter_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any change of the folder, it holds the old pair, no adapter, or the new one; never a mixture."""
    known, folder = {}, tmp_path / "adapter"
    for name, alpha in (("new", 8.0), ("old", 2.0)):  # either file of one with the other of the other would load
        model = tiny_models.build("llama")
        attachment = attach(model, "lora", alpha=alpha)
        with torch.no_grad():
            attachment.state()[A].mul_(alpha)
        save_adapter(tmp_path / name, attachment, base="here", task_type=None, heads={})
        known[name] = attachment, output(model)
    changes = {name: getattr(Path, name) for name in ("replace", "rename", "unlink")}
    seen: list[str] = []
    while "done" not in seen:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        (folder / "README.md").write_text("mine")
        left = iter(range(len(seen)))

        def change(*arguments: Any, name: str, left: Iterator[int] = left, **given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return changes[name](*arguments, **given)

        with monkeypatch.context() as patch:
            for name in changes:
                patch.setattr(Path, name, partialmethod(change, name=name))
            try:
                save_adapter(folder, known["new"][0], base="here", task_type=None, heads={})
                finished = True
            except KeyboardInterrupt:
                finished = False
        seen.append("done" if finished else _which(folder, {name: logits for name, (_, logits) in known.items()}))
        assert (folder / "README.md").read_text() == "mine"
    assert _which(folder, {name: logits for name, (_, logits) in known.items()}) == "new"
    assert seen[0] == "old" and "none" in seen and "mixture" not in seen
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files


def _which(folder: Path, known: dict[str, torch.Tensor]) -> str:
    """Say which adapter a folder holds, by the logits that it gives."""
    if not (folder / "adapter_config.json").is_file():
        return "none"
    model = tiny_models.build("llama")
    load_adapter(model, folder)
    return next((name for name, logits in known.items() if torch.equal(output(model), logits)), "mixture")


def test_hub_ids_go_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    save_adapter(tmp_path, attach(model, "lora"), base="here", task_type=None, heads={})
    asked = []

    def fetch(repo: str, revision: str) -> tuple[Path, str]:
        asked.append((repo, revision))
        return tmp_path, "0" * 40

    monkeypatch.setattr("deltaspec.io.hub.fetch", fetch)
    again = tiny_models.build("llama")
    load_adapter(again, "owner/adapter@v2")
    assert asked == [("owner/adapter", "v2")]
    with pytest.raises(OptionError, match="There is an adapter 'default'"):
        load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(model))
