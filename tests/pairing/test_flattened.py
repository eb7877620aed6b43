"""Module names with underscores for dots: which path of the base they mean, from names alone."""

from __future__ import annotations

import pytest

from deltaspec.errors import PairingError
from deltaspec.pairing.flattened import is_flattened, resolve_flattened
from deltaspec.pairing.plan import Plan
from tests.pairing.headers import adapter, checkpoint, term


def resolve(paths, modules, plan=None):
    base = checkpoint({f"{path}.weight": (4, 3) for path in paths} | {"norm.bias": (3,), "one.q": (4, 3)})
    lora = adapter({name: term(name, 4, 3, scaling=float(i)) for i, name in enumerate(modules)})
    found = resolve_flattened(lora, base, plan or Plan())
    return {path: found_term.scaling for path, found_term in found.modules.items()}


def test_only_names_with_a_component_are_flattened():
    assert is_flattened(adapter({"lora_unet_a": term("a", 4, 3), "lora_te1_b": term("b", 4, 3)}))
    assert not is_flattened(adapter({"lora_unet_a": term("a", 4, 3), "model.b": term("b", 4, 3)}))
    assert not is_flattened(adapter({}))
    plain = adapter({"model.lora_unet_a": term("a", 4, 3)})
    assert resolve_flattened(plain, checkpoint({}), Plan()) is plain


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_one_prefix_holds_all_modules_of_a_component(prefix):
    """Underscores of the names themselves are no dots; what is shorter than its path lies under a prefix."""
    paths = [prefix + path for path in ("mid_block.to_q", "mid_block.attn.0.to_q", "out")]
    modules = ["lora_unet_mid_block_attn_0_to_q", "lora_unet_out", "lora_unet_mid_block_to_q"]
    assert resolve(paths, modules) == {paths[1]: 0.0, paths[2]: 1.0, paths[0]: 2.0}


def test_whole_paths_go_before_ends_of_others():
    """Both prefixes hold every module; none is meant."""
    assert resolve(["a.q", "b.a.q", "c.a.q"], ["lora_unet_a_q"]) == {"a.q": 0.0}


def test_components_are_resolved_each_for_itself():
    paths = ["unet.down.q", "text.layers.0.q"]
    modules = ["lora_te1_layers_0_q", "lora_unet_down_q"]
    assert resolve(paths, modules) == {"text.layers.0.q": 0.0, "unet.down.q": 1.0}


def test_a_component_of_another_model_is_listed_and_the_others_stay():
    plan = Plan()
    found = resolve(["unet.down.q"], ["lora_te1_layers_0_q", "lora_te1_layers_1_q", "lora_unet_down_q"], plan)
    assert found == {"unet.down.q": 2.0}
    assert [str(note) for note in plan.notes] == [
        "the adapter's te1 (2 modules) stays out: it is of another model than base, or of another layout"
    ]
    with pytest.raises(PairingError, match="targets 'lora_te1_layers_0_q', and base has no module of that name"):
        resolve(["unet.down.q"], ["lora_te1_layers_0_q", "lora_te2_layers_0_q"])


@pytest.mark.parametrize("paths", [["a.q", "x.b.q", "x.b.k"], ["x.b.q", "x.b.k", "b.v"]])
def test_a_component_held_in_part_names_what_is_missing_where_most_is(paths):
    with pytest.raises(PairingError, match="targets 'lora_unet_b_o'"):
        resolve(paths, ["lora_unet_b_q", "lora_unet_b_o", "lora_unet_b_k"])


def test_two_meanings_are_refused_and_both_named():
    with pytest.raises(PairingError, match=r"'lora_unet_q' may be 'one\.q' or 'two\.q' of base"):
        resolve(["one.q", "two.q"], ["lora_unet_q"])
    with pytest.raises(PairingError, match=r"'lora_unet_a_q' may be 'a_q' or 'a\.q' of base"):
        resolve(["a_q", "a.q", "k"], ["lora_unet_k", "lora_unet_a_q"])
    with pytest.raises(PairingError, match=r"'lora_unet_a_q' may be 'x\.a_q' or 'x\.a\.q' of base"):
        resolve(["x.a_q", "x.a.q", "x.k"], ["lora_unet_k", "lora_unet_a_q"])
