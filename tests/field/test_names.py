"""One model under several names: wrappers, other versions of the library, towers; paired right, or refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.architecture.canonical_names import canonical_names
from deltaspec.cli.main import cli
from deltaspec.errors import CheckpointError, OptionError, PairingError
from deltaspec.pairing.names import align_best, align_names
from deltaspec.workflows.analysis.analyze import make_plan
from deltaspec.workflows.merging.merge import merge
from tests import tiny_models
from tests.families import FAMILIES, random_state, write
from tests.workflows.analysis.test_live import attach, write_adapter

OPTIONS = deltaspec.AnalyzeOptions(device="cpu")
LLAMA = FAMILIES["llama"]


def moved(state, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=g) for name, tensor in state.items()}


def wrap(name, wrappers):
    """Put wrappers where FSDP, activation checkpointing, torch.compile and PEFT put them."""
    first, *others = wrappers
    pieces = name.split(".")
    for wrapper in others:
        for at in [i for i, piece in enumerate(pieces) if piece.isdecimal()]:
            pieces.insert(at + 1, wrapper)
    return ".".join([first, *pieces] if first else pieces)


@pytest.mark.parametrize(
    "wrappers",
    [
        ("_fsdp_wrapped_module", "_fsdp_wrapped_module"),
        ("module._orig_mod", "_checkpoint_wrapped_module"),
        ("_orig_mod.module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
        ("", "_orig_mod"),
        ("module.module._forward_module",),
        ("base_model.model", "_fsdp_wrapped_module._checkpoint_wrapped_module"),
        ("_fsdp_wrapped_module._fpw_module.base_model.model.module",),
    ],
)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_wrappers_in_any_order_on_either_side_change_nothing(wrappers, side, tmp_path):
    base = random_state(LLAMA)
    states = {"base": base, "tuned": moved(base)}
    plain = [write(tmp_path / name, state, LLAMA.config) for name, state in states.items()]
    states[side] = {wrap(name, wrappers): tensor for name, tensor in states[side].items()}
    folders = [write(tmp_path / "wrapped" / name, state, LLAMA.config) for name, state in states.items()]
    found, right = (make_plan(*sides, OPTIONS)[0] for sides in (folders, plain))
    assert [str(pair.key) for pair in found.pairs] == [str(pair.key) for pair in right.pairs]
    assert [v.key for v in found.vectors] == [v.key for v in right.vectors]
    assert not found.skipped
    assert not found.notes
    first, second = (
        deltaspec.analyze(*sides, tmp_path / f"run{i}", options=OPTIONS) for i, sides in enumerate((folders, plain))
    )
    assert [r.metrics for r in first.records] == [r.metrics for r in second.records]


def test_layers_of_an_adapter_left_in_a_merged_model(tmp_path):
    base = random_state(LLAMA)
    tuned = {"base_model.model." + n.replace("_proj.weight", "_proj.base_layer.weight"): t for n, t in base.items()}
    plan, *_ = make_plan(write(tmp_path / "b", base, {}), write(tmp_path / "t", moved(tuned), {}), OPTIONS)
    assert {pair.key.tensor for pair in plan.pairs} | {v.key.tensor for v in plan.vectors} == set(base)


def test_two_names_that_are_one_without_wrappers_are_refused(tmp_path):
    one = {"layers.0.q.weight": torch.zeros(2, 2), "layers.0._orig_mod.q.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"'layers\.0\._orig_mod\.q\.weight' from 'layers\.0\.q\.weight'"):
        make_plan(write(tmp_path / "b", one, {}), write(tmp_path / "t", one, {}), OPTIONS)


def test_a_module_of_the_model_itself_is_no_wrapper():
    """Only what all names begin with is DDP's; and names of words that end alike stay."""
    names = ["module.a.weight", "head.weight", "my_orig_mod.x.weight", "a.base_layer_norm.weight", "experts.base_layer"]
    assert canonical_names(names) == {name: name for name in names}
    nested = "experts.base_layer.lora_A.weight"
    assert canonical_names([nested]) == {nested: nested}


def lora(folder, base, names, *, rename=lambda name: name, seed=5, **config):
    """Write an adapter in PEFT's format, its keys renamed; return each tensor's ΔW in float64."""
    g, state, deltas = torch.Generator().manual_seed(seed), {}, {}
    for name in names:
        d_out, d_in = base[name].shape
        a, b = torch.randn(2, d_in, generator=g), torch.randn(d_out, 2, generator=g)
        path = rename(name.removesuffix(".weight"))
        state |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        deltas[name] = 3 * b.double() @ a.double()
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return deltas


def changed(folder, base):
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == base.keys()
    return {n: merged[n].double() - base[n].double() for n in base if not torch.equal(merged[n], base[n])}


@pytest.mark.parametrize("where", ["adapter", "base", "both"])
def test_merge_takes_wrappers_off_and_keeps_the_stored_names_of_the_base(where, tmp_path):
    wrappers = ("_fsdp_wrapped_module", "_fsdp_wrapped_module")
    plain = random_state(LLAMA)
    base = {wrap(n, wrappers) if where != "adapter" else n: t for n, t in plain.items()}
    names = [n for n in plain if n.endswith("q_proj.weight")]
    inner = (
        (lambda n: f"base_model.model.{wrap(n, wrappers)}") if where != "base" else lambda n: f"base_model.model.{n}"
    )
    deltas = lora(tmp_path / "lora", plain, names, rename=inner)
    merge(write(tmp_path / "b", base, LLAMA.config), [tmp_path / "lora"], tmp_path / "m")
    found = changed(tmp_path / "m", base)
    assert len(found) == len(names)
    for name, delta in deltas.items():
        stored = name if where == "adapter" else wrap(name, wrappers)
        assert torch.allclose(found[stored], delta, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_tied_head_and_a_new_one_stay_under_the_wrappers_of_the_base(wrapper, tmp_path):
    """A pickled base of which the head shares memory, and an adapter that brings a head of its own."""
    plain = {n: t for n, t in random_state(LLAMA).items() if n != "lm_head.weight"}
    embed = plain["model.embed_tokens.weight"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps(LLAMA.config | {"tie_word_embeddings": True}))
    state = {f"{wrapper}{n}": t for n, t in plain.items()}
    torch.save(state | {f"{wrapper}lm_head.weight": embed}, tmp_path / "b" / "pytorch_model.bin")
    q = "model.layers.0.self_attn.q_proj.weight"
    deltas = lora(tmp_path / "a", plain, [q])
    save_file(
        load_file(tmp_path / "a" / "adapter_model.safetensors") | {"score.weight": torch.ones(2, embed.shape[1])},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    merge(tmp_path / "b", [tmp_path / "a"], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    merged = load_file(file)
    assert merged.keys() == state.keys() | {f"{wrapper}score.weight"}
    assert torch.allclose(merged[f"{wrapper}{q}"].double() - plain[q].double(), deltas[q], atol=1e-5)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()[f"{wrapper}lm_head.weight"] == f"{wrapper}model.embed_tokens.weight"
    assert not make_plan(tmp_path / "m", tmp_path / "m", OPTIONS)[0].one_sided


def test_a_tie_of_one_naming_stops_nothing_that_pairs_more_under_another():
    layers = [f"layers.{i}.{role}.weight" for i in range(3) for role in "qkv"]
    plain = [f"model.{n}" for n in layers], [*(f"model.{n}" for n in layers), *(f"tower.{n}" for n in layers[:3])]
    tied = layers, [f"{tower}.{n}" for tower in ("one", "two") for n in layers]
    assert align_best([tied, plain])[:2] == (1, {n: n for n in plain[0]})
    assert align_best([plain, tied])[0] == 0
    for fewer in (plain[0][:4], plain[1]), (plain[0], plain[1][:4]):
        with pytest.raises(PairingError, match="fit equally well"):
            align_best([fewer, tied])


def towers(width=(4, 4), depth=(2, 2)):
    """Two towers of one kind, as SigLIP has them."""
    state = {}
    for tower, d, layers in zip(("text_model", "vision_model"), width, depth, strict=True):
        for i, role in itertools.product(range(layers), ("q_proj", "k_proj", "v_proj")):
            state[f"{tower}.encoder.layers.{i}.self_attn.{role}.weight"] = torch.randn(d, d)
    return state


def vision_lora(folder, base, **kept):
    own = "vision_model."
    names = [n for n in base if n.startswith(own) and all(word in n for word in kept.values())]
    return names, lora(folder, base, names, rename=lambda n: f"base_model.model.{n.removeprefix(own)}")


def test_an_adapter_that_fits_two_towers_is_refused_with_the_way_out(tmp_path):
    base = towers()
    vision_lora(tmp_path / "lora", base)
    with pytest.raises(PairingError) as stopped:
        merge(write(tmp_path / "b", base, {}), [tmp_path / "lora"], tmp_path / "m")
    said = str(stopped.value)
    assert "'encoder.layers.0.self_attn.k_proj.weight' (and 5 more) of the tuned model" in said
    assert "--map '=text_model.' or --map '=vision_model.'" in said


@pytest.mark.parametrize("other", [{"width": (6, 4)}, {"depth": (1, 2)}])
def test_shapes_and_numbers_of_layers_tell_towers_apart(other, tmp_path):
    base = towers(**other)
    _, deltas = vision_lora(tmp_path / "lora", base)
    merge(write(tmp_path / "b", base, {}), [tmp_path / "lora"], tmp_path / "m")
    assert changed(tmp_path / "m", base).keys() == deltas.keys()


def test_two_copies_of_the_weights_are_a_tie():
    """An exponential average beside the weights themselves, and a fine-tune that says neither."""
    names = [f"layers.{i}.{role}.weight" for i in range(3) for role in "qk"]
    both = [f"{copy}.{name}" for copy in ("model", "ema") for name in names]
    with pytest.raises(PairingError, match="of the tuned model is in the base"):
        align_names(both, names)
    with pytest.raises(PairingError, match="of the base is in the tuned model"):
        align_names(names, both)


def test_the_order_of_names_decides_nothing():
    names = [f"layers.{i}.{role}.{leaf}" for i in range(4) for role in "qkvo" for leaf in ("weight", "bias")]
    base = [f"bert.{n}" for n in names] + [f"head.{n}" for n in names[:3]] + ["cls.dense.weight"]
    tuned = [f"model.encoder.{n}" for n in names] + ["model.cls.dense.weight", "other.0.weight"]
    expected = align_names(base, tuned)
    for seed in range(20):
        shuffle = random.Random(seed).shuffle
        shuffle(base)
        shuffle(tuned)
        assert align_names(base, tuned) == expected
    assert expected[0] == {f"bert.{n}": f"model.encoder.{n}" for n in names}


def test_a_few_names_that_agree_are_no_evidence():
    """The ends of another model's modules, whatever their numbers."""
    base = [f"double_blocks.{i}.{side}_mlp.{n}.weight" for i in range(3) for side in ("img", "txt") for n in (0, 2)]
    assert align_names(base, [f"transformer_blocks.{i}.ff.net.2.weight" for i in range(3)]) == ({}, "")
    assert align_names(base[:2], ["transformer_blocks.1.ff.net.2.weight"]) == ({}, "")
    names = [f"encoder.{i}.a.weight" for i in range(9)] + ["encoder.conv_in.weight", "encoder.conv_out.weight"]
    other = [f"vae.encoder.{i}.b.weight" for i in range(9)] + [
        "vae.encoder.conv_in.weight",
        "vae.encoder.conv_out.weight",
    ]
    assert align_names(names, other) == ({}, "")


def test_towers_that_are_renamed_each_in_its_own_way_pair():
    layers = [f"{i}.{role}.weight" for i in range(3) for role in "qkv"]
    base = [f"language_model.model.layers.{n}" for n in layers] + [f"vision_tower.encoder.layers.{n}" for n in layers]
    tuned = [f"model.text.layers.{n}" for n in layers] + [f"model.image.encoder.layers.{n}" for n in layers]
    mapping, note = align_names(base, tuned)
    assert mapping == dict(zip(base, tuned, strict=True))
    assert note.count(" where those of the base begin with ") == 2


def test_layers_that_one_side_lacks_are_not_those_of_a_tower_that_only_the_other_has():
    """Pruned layers of the base beside a new tower whose layers have the same names behind another prefix."""
    layers = {i: [f"layers.{i}.{role}.weight" for role in "qkv"] for i in range(4)}
    base = [f"model.{n}" for i in range(4) for n in layers[i]]
    for tower in (range(3), [1]):
        kept = [f"model.{n}" for i in (0, 2, 3) for n in layers[i]]
        tuned = kept + [f"vision.encoder.{n}" for i in tower for n in layers[i]]
        assert align_names(base, tuned) == ({name: name for name in kept}, "")
        assert align_names(tuned, base) == ({name: name for name in kept}, "")


def test_a_language_model_moves_and_the_rest_gets_a_prefix():
    """The rest is told by a shorter prefix, which the language model's does not contradict."""
    layers = [f"layers.{i}.{role}.weight" for i in range(3) for role in "qkv"]
    for text in (1, 3):
        base = [f"language_model.model.{text}{n}" for text in "ab"[: text - 1] or "a" for n in layers]
        tuned = [n.replace("language_model.model.", "model.language_model.") for n in base]
        base += [f"vision_tower.{n}" for n in layers] + ["multi_modal_projector.linear_1.weight"]
        tuned += [f"model.vision_tower.{n}" for n in layers] + ["model.multi_modal_projector.linear_1.weight"]
        assert align_names(base, tuned)[0] == dict(zip(base, tuned, strict=True))


def pairing(*maps):
    return deltaspec.PairOptions(map=maps)


@pytest.mark.parametrize(
    "maps", [("=vision_model.",), ("encoder=vision_model.encoder",), ("encoder.layers.=vision_model.encoder.layers.",)]
)
def test_a_map_decides_a_tie(maps, tmp_path):
    base = towers()
    _, deltas = vision_lora(tmp_path / "lora", base)
    folder = write(tmp_path / "b", base, {})
    merge(folder, [tmp_path / "lora"], tmp_path / "m", options=deltaspec.MergeOptions(pairing=pairing(*maps)))
    found = changed(tmp_path / "m", base)
    assert found.keys() == deltas.keys()
    assert all(torch.allclose(found[name], delta, atol=1e-5) for name, delta in deltas.items())


def test_maps_of_a_checkpoint_in_their_order(tmp_path):
    """A whole name before a prefix; what no map names stays."""
    base = random_state(LLAMA)
    odd = "model.layers.0.self_attn.q_proj.weight"
    tuned = {("odd.weight" if n == odd else n.replace("model.layers.", "blocks.")): t for n, t in moved(base).items()}
    options = deltaspec.AnalyzeOptions(device="cpu", pairing=pairing(f"odd.weight={odd}", "blocks=model.layers"))
    plan, *_ = make_plan(write(tmp_path / "b", base, {}), write(tmp_path / "t", tuned, {}), options)
    assert not plan.skipped
    assert all(str(pair.key) == pair.tuned.spec.name for pair in plan.pairs)
    run = deltaspec.analyze(tmp_path / "b", tmp_path / "t", tmp_path / "run", options=options)
    assert not run.failures
    assert run.manifest["options"]["map"] == [f"odd.weight={odd}", "blocks=model.layers"]


def test_a_map_of_nothing_and_one_of_two_names_to_one(tmp_path):
    base = random_state(LLAMA)
    folders = [write(tmp_path / side, base, {}) for side in "bt"]
    for maps, said in (
        (("nowhere.=model.",), r"--map 'nowhere\.=model\.' fits no name of"),
        (("model=model.layers", "mode=x"), "--map 'mode=x' fits no name"),
        (("model.layers.0=model.layers.1",), "makes two names of .* one"),
    ):
        with pytest.raises(OptionError, match=said):
            make_plan(*folders, deltaspec.AnalyzeOptions(device="cpu", pairing=pairing(*maps)))
    for wrong in ("model", "a=a"):
        with pytest.raises(OptionError, match="--map is"):
            pairing(wrong)


def test_an_adapter_of_another_method_is_mapped_and_loses_its_wrappers_too(tmp_path):
    model = tiny_models.build("llama")
    base, attachment = tiny_models.save(tiny_models.build("llama"), tmp_path / "base"), attach(model, "vera")
    plain = write_adapter(tmp_path / "plain", attachment)
    odd = write_adapter(tmp_path / "odd", attachment)
    file = odd / "adapter_model.safetensors"
    stored = load_file(file)
    renamed = {n.replace("model.layers.", "blocks._fsdp_wrapped_module."): t for n, t in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, file)
    right = deltaspec.analyze(base, plain, tmp_path / "r1", options=OPTIONS)
    options = deltaspec.AnalyzeOptions(device="cpu", pairing=pairing("blocks=model.layers"))
    found = deltaspec.analyze(base, odd, tmp_path / "r2", options=options)
    assert [r.metrics for r in found.records] == [r.metrics for r in right.records]
    with pytest.raises(OptionError, match="fits no name"):
        deltaspec.analyze(base, plain, tmp_path / "r3", options=options)
    one = deltaspec.AnalyzeOptions(device="cpu", pairing=deltaspec.PairOptions(component="unet"))
    with pytest.raises(OptionError, match="no adapter here holds components"):
        deltaspec.analyze(base, plain, tmp_path / "r3", options=one)


def test_the_command_line_takes_several_maps(tmp_path):
    base = random_state(LLAMA)
    tuned = {n.replace("model.layers.", "blocks.").replace("lm_head", "head"): t for n, t in moved(base).items()}
    folders = [str(write(tmp_path / side, state, LLAMA.config)) for side, state in (("b", base), ("t", tuned))]
    maps = ["--map", "blocks=model.layers", "--map", "head=lm_head", "--quiet"]
    for command in ("analyze", "extract"):
        given = [command, *folders, "-o", str(tmp_path / command), *maps]
        found = CliRunner().invoke(cli, given)
        assert found.exit_code == 0, found.output
        assert "only in the" not in found.output
    checked = CliRunner().invoke(cli, ["verify", *folders, str(tmp_path / "extract"), *maps])
    assert "As good as deltaspec.json claims." in checked.output, checked.output
    assert checked.exit_code == 0
    wrong = CliRunner().invoke(cli, ["analyze", *folders, "-o", str(tmp_path / "w"), "--map", "blocks"])
    assert wrong.exit_code == 2
    assert "expected OLD=NEW" in wrong.output


def test_the_hash_seed_decides_nothing():
    code = (
        "from deltaspec.pairing.names import align_names\n"
        "layers = [f'{i}.{r}.weight' for i in range(3) for r in 'qkv']\n"
        "base = {f'{t}.layers.{n}' for t in ('text', 'vision', 'audio') for n in layers}\n"
        "tuned = {f'model.{t}_tower.layers.{n}' for t in ('text', 'vision') for n in layers}\n"
        "try: print(sorted(align_names(base, tuned)[0].items()))\n"
        "except Exception as error: print(error)\n"
    )
    said = set()
    for seed in "0123":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        said.add(run.stdout)
    assert len(said) == 1
    assert "fit equally well" in said.pop()
