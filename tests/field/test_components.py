"""Several components in one adapter's file: each goes where its names and shapes fit, and none vanishes."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.cli.main import cli
from deltaspec.errors import OptionError, PairingError
from tests.families import write

UNET = {
    f"down_blocks.1.attentions.0.transformer_blocks.0.attn{n}.to_{r}.weight": (16, 16) for n in (1, 2) for r in "qkv"
}


def text_encoder(layers, width):
    shapes = {"q_proj": (width, width), "k_proj": (width, width), "v_proj": (width, width)}
    roles = {f"self_attn.{role}": shape for role, shape in shapes.items()}
    roles |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
    return {
        f"text_model.encoder.layers.{i}.{role}.weight": shape for i in range(layers) for role, shape in roles.items()
    }


def random_state(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def kohya(component, shapes, seed=1, cut=""):
    """One component's factors, flattened, and its ΔW of each tensor."""
    g, state, deltas = torch.Generator().manual_seed(seed), {}, {}
    for name, (d_out, d_in) in shapes.items():
        flat = f"lora_{component}_{name.removesuffix('.weight').removeprefix(cut).replace('.', '_')}"
        down, up = torch.randn(2, d_in, generator=g), torch.randn(d_out, 2, generator=g)
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
        deltas[name] = 0.5 * up.double() @ down.double()
    return state, deltas


def sdxl(tmp_path, first=None, second=None):
    """A file of three components, and the ΔW of each."""
    shapes = {"unet": UNET, "te1": first or text_encoder(2, 12), "te2": second or text_encoder(4, 20)}
    state, deltas = {}, {}
    for seed, (component, found) in enumerate(shapes.items()):
        factors, deltas[component] = kohya(component, found, seed=seed)
        state |= factors
    save_file(state, tmp_path / "sdxl.safetensors")
    return tmp_path / "sdxl.safetensors", shapes, deltas


def merged(tmp_path, base, adapter, **options):
    folder = write(tmp_path / "base", base, {})
    pairing = deltaspec.PairOptions(**options)
    report = deltaspec.merge(folder, [adapter], tmp_path / "m", options=deltaspec.MergeOptions(pairing=pairing))
    state = load_file(tmp_path / "m" / "model.safetensors")
    assert state.keys() == base.keys()
    return {n: state[n].double() - base[n].double() for n in base if not torch.equal(state[n], base[n])}, report


def close(found, right):
    assert found.keys() == right.keys()
    assert all(torch.allclose(found[name], delta, atol=1e-5) for name, delta in right.items())


@pytest.mark.parametrize("component", ["unet", "te1", "te2"])
def test_each_folder_takes_its_own_component_and_names_the_others(component, tmp_path):
    file, shapes, deltas = sdxl(tmp_path)
    found, report = merged(tmp_path, random_state(shapes[component]), file)
    close(found, deltas[component])
    said = sorted(note.split(" modules) stays out")[0] for note in report.notes)
    others = [name for name in sorted(shapes) if name != component]
    assert said == [f"the adapter's {name} ({len(shapes[name])}" for name in others]


def test_all_components_of_one_file_with_all_of_the_model(tmp_path):
    """Prefixes as of a pipeline in one file; shapes tell the text encoders apart."""
    file, shapes, deltas = sdxl(tmp_path)
    homes = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}
    whole = {homes[part] + name: shape for part, found in shapes.items() for name, shape in found.items()}
    found, report = merged(tmp_path, random_state(whole), file)
    close(found, {homes[part] + name: d for part, rows in deltas.items() for name, d in rows.items()})
    assert report.notes == ()


def test_two_components_that_are_the_same_modules_are_a_tie_and_one_is_chosen(tmp_path):
    same = text_encoder(2, 12)
    file, shapes, deltas = sdxl(tmp_path, same, same)
    base = random_state(shapes["te1"])
    with pytest.raises(PairingError, match="te1 and te2 both fit .*--component te1 or --component te2"):
        merged(tmp_path, base, file)
    for component in ("te1", "te2"):
        found, report = merged(tmp_path / component, base, file, component=component)
        close(found, deltas[component])
        assert report.notes == ()


def test_a_component_that_fits_for_the_most_part_is_not_of_another_model(tmp_path):
    """Four of five of its layers: something is missing, and merging the rest would hide it."""
    file, _, _ = sdxl(tmp_path, text_encoder(5, 12), text_encoder(1, 20))
    base = text_encoder(4, 12) | {f"unet.{name}": shape for name, shape in UNET.items()}
    with pytest.raises(PairingError, match="targets 'lora_te1_text_model_encoder_layers_4_mlp_fc1'"):
        merged(tmp_path, random_state(base), file)
    found, _ = merged(tmp_path / "unet", random_state(base), file, component="unet")
    assert len(found) == len(UNET)


def test_a_component_that_is_not_there_and_one_of_an_adapter_without_any(tmp_path):
    file, shapes, _ = sdxl(tmp_path)
    base = random_state(shapes["unet"])
    with pytest.raises(OptionError, match="--component is 'te3': .* holds te1, te2, unet"):
        merged(tmp_path, base, file, component="te3")
    with pytest.raises(OptionError, match="no adapter here holds components"):
        deltaspec.analyze(
            *(write(tmp_path / side, base, {}) for side in "ab"),
            tmp_path / "r",
            options=deltaspec.AnalyzeOptions(pairing=deltaspec.PairOptions(component="unet")),
        )


def test_names_that_begin_with_more_than_the_base_has(tmp_path):
    """A text encoder saved by itself has lost the name that its adapter still says."""
    shapes = text_encoder(2, 12)
    state, deltas = kohya("te", shapes)
    save_file(state, tmp_path / "te.safetensors")
    base = {name.removeprefix("text_model."): tensor for name, tensor in random_state(shapes).items()}
    found, _ = merged(tmp_path, base, tmp_path / "te.safetensors")
    close(found, {name.removeprefix("text_model."): delta for name, delta in deltas.items()})


def test_every_command_that_takes_adapters_takes_a_component(tmp_path):
    same = text_encoder(2, 12)
    file, _, deltas = sdxl(tmp_path, same, same)
    base, out = write(tmp_path / "base", random_state(same), {}), tmp_path / "out"

    def call(*args, code=0):
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert result.exit_code == code, result.output
        return result.output

    for command in (
        ("analyze", base, file, "-o", out / "run"),
        ("merge", base, file, "-o", out / "merged"),
        ("resize", file, "--base", base, "--rank", 2, "-o", out / "resized"),
        ("combine", file, "--base", base, "-o", out / "combined"),
    ):
        assert "--component te1" in call(*command, code=2)
        call(*command, "--component", "te2")
    analysed = {record.key.tensor: record for record in deltaspec.Run.load(out / "run").records}
    for name, delta in deltas["te2"].items():
        assert analysed[name].metrics["frobenius_norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
    assert json.loads((out / "merged" / "deltaspec.json").read_text())["component"] == "te2"
    tuned = write(tmp_path / "tuned", load_file(out / "merged" / "model.safetensors"), {})
    assert "error 0.00000" in call("verify", base, tuned, file, "--component", "te2")
    call("verify", base, tuned, file, "--component", "te1", code=1)
    said = call("verify", base, tuned, file, "--component", "te2", "--text", tmp_path / "any.txt", code=2)
    assert "--text runs the models" in said


def test_two_files_of_components_are_compared_component_by_component(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (one, shapes, _), (two, _, _) = sdxl(tmp_path / "a"), sdxl(tmp_path / "b")
    for component in (*shapes, ""):
        options = deltaspec.AnalyzeOptions(pairing=deltaspec.PairOptions(component=component))
        run = deltaspec.analyze(one, two, tmp_path / f"r{component}", options=options)
        assert len(run.records) == sum(len(found) for name, found in shapes.items() if component in (name, ""))


def test_a_component_that_the_base_may_hold_under_other_names_is_not_left_out(tmp_path):
    """One file with all towers, its UNet in the original naming: merging the text encoder alone is to be asked for."""
    te = text_encoder(1, 8)
    unet = {f"model.diffusion_model.input_blocks.4.1.attn{n}.to_{r}.weight": (16, 16) for n in (1, 2) for r in "qkv"}
    shapes = {**unet, **{f"cond_stage_model.transformer.{name}": shape for name, shape in te.items()}}
    save_file(random_state(shapes), tmp_path / "base.safetensors")
    factors = kohya("unet", UNET)[0] | kohya("te", te)[0]
    save_file(factors, tmp_path / "lora.safetensors")
    with pytest.raises(PairingError, match=r"unet \(6 modules\) has no place in .*--component te"):
        deltaspec.merge(tmp_path / "base.safetensors", [tmp_path / "lora.safetensors"], tmp_path / "out.safetensors")
