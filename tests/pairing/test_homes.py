"""Where factors belong: stored and running names, experts one by one and stacked, parts of fused rows."""

from __future__ import annotations

import pytest

import deltaspec
from deltaspec.errors import PairingError
from deltaspec.io.lay_out import lay_out
from deltaspec.pairing.adapters import pair_adapter, pair_adapters, pair_split_biases
from deltaspec.pairing.homes import factor_shape, find_homes
from deltaspec.pairing.names import natural_order
from deltaspec.pairing.plan import Plan
from deltaspec.types import View
from tests.pairing.headers import adapter, checkpoint, family, spec, term
from tests.pairing.test_pairing import reasons

OPTIONS = deltaspec.AnalyzeOptions(device="cpu")
EXPERTS = "model.layers.0.mlp.experts"


def test_shapes_of_stored_factors():
    assert factor_shape(term("a", 8, 6)) == (8, 6)
    assert factor_shape(term("a", 8, 6, embedding=True)) == (8, 6)
    assert factor_shape(term("a", 8, 6, experts=3)) == (8, 6)
    assert factor_shape(term("a", 8, 6, kernel=(3, 2))) == (8, 36)


def test_stored_names_go_before_running_ones_and_a_prefix_is_noted():
    base = family("mixtral")
    stored = [name.removesuffix(".weight") for name in base.tensors if "w1" in name]
    plan = Plan()
    homes = find_homes(lay_out(base), stored, plan)
    assert {path: [name for name, _ in found] for path, found in homes.items()} == {
        path: [f"{path}.weight"] for path in stored
    }
    assert plan.notes == []
    homes = find_homes(lay_out(base), [f"{EXPERTS}.gate_up_proj"], plan)
    (found,) = homes.values()
    assert sorted((name.rpartition("experts.")[2], place.expert, place.part, place.parts) for name, place in found) == [
        (f"{e}.{leaf}.weight", e, part, 2) for e in range(3) for part, leaf in enumerate(("w1", "w3"))
    ]
    homes = find_homes(lay_out(base), [f"base_model.{path}" for path in stored], plan)
    assert len(homes) == len(stored)
    assert "'base_model.'" in str(plan.notes[0])
    assert find_homes(lay_out(base), ["nowhere"], Plan()) == {}


@pytest.mark.parametrize("name", ["mixtral", "mixtral_stacked"])
def test_a_stack_of_factors_against_experts_of_any_layout(name):
    up, down = (f"{EXPERTS}.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
    lora = adapter({up: term(up, 80, 24, experts=3), down: term(down, 24, 40, experts=3)})
    plan = pair_adapter(family(name), lora, OPTIONS)
    found = {(pair.key.role, pair.key.expert): pair for pair in plan.pairs}
    assert len(found) == len(plan.pairs) == 9
    names = [pair.key.tensor for pair in plan.pairs]
    assert names == sorted(names, key=natural_order)  # the base's, though a path of the adapter may mean several
    rows = {"gate_proj": (0, 40), "up_proj": (40, 80), "down_proj": (0, 24)}
    for (role, expert), pair in found.items():
        start, stop = rows[role]
        view = pair.tuned.view
        assert (view.expert, view.transposed, view.groups) == (expert, False, 1)
        assert (view.start, view.stop or (24 if role == "down_proj" else 40)) == (start, stop)
        assert view.shape == pair.shape == (stop - start, 24 if role != "down_proj" else 40)
        assert pair.tuned.terms == (lora.modules[down if role == "down_proj" else up],)
        assert pair.base.spec.name == pair.key.tensor


@pytest.mark.parametrize("name", ["mixtral", "mixtral_stacked"])
@pytest.mark.parametrize("wrong", [{"experts": 2}, {"experts": 4}, {"d_out": 40}, {"d_in": 23}, {"experts": 0}])
def test_a_stack_of_another_size_does_not_fit(name, wrong):
    up = f"{EXPERTS}.gate_up_proj"
    shape = {"d_out": 80, "d_in": 24, "experts": 3} | wrong
    lora = adapter({up: term(up, shape["d_out"], shape["d_in"], experts=shape["experts"])})
    with pytest.raises(PairingError, match="Cannot pair"):
        pair_adapter(family(name), lora, OPTIONS)


def test_a_stack_that_says_it_is_transposed_and_one_that_does_not():
    """gpt_oss marks its stacks, so that PEFT's factors are of (d_out, d_in); llama4's are of what is stored."""
    path = f"{EXPERTS}.down_proj"
    plan = pair_adapter(family("gpt_oss"), adapter({path: term(path, 24, 40, experts=3)}), OPTIONS)
    assert [pair.tuned.view for pair in plan.pairs] == [View((24, 40), expert=e) for e in range(3)]
    base = family("llama4")
    path = next(name for name in base.tensors if name.endswith("experts.down_proj"))
    experts, *stored = base.tensors[path].shape
    plan = pair_adapter(base, adapter({path: term(path, *stored, experts=experts)}), OPTIONS)
    turned = [View((stored[1], stored[0]), expert=e, transposed=True) for e in range(experts)]
    assert [pair.tuned.view for pair in plan.pairs] == turned


def test_every_part_of_a_fused_module_takes_its_rows_of_the_product():
    path = "model.layers.0.self_attn.qkv_proj"
    plan = pair_adapter(family("phi3"), adapter({path: term(path, 48, 24)}), OPTIONS)
    assert [(p.key.role, p.tuned.view.start, p.tuned.view.stop, p.shape) for p in plan.pairs] == [
        ("q_proj", 0, 24, (24, 24)),
        ("k_proj", 24, 36, (12, 24)),
        ("v_proj", 36, 48, (12, 24)),
    ]
    others = len([n for n, s in family("phi3").tensors.items() if len(s.shape) == 2]) - 1
    assert [str(note) for note in plan.notes] == [
        f"{others} matrices of the base have no factors in the adapter: their delta is zero"
    ]


def test_factors_of_a_head_that_is_the_embedding_are_compared_with_it():
    embed, q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj"
    base = checkpoint({embed: (9, 4), f"{q}.weight": (4, 4)}, model_type="llama")
    lora = adapter({q: term(q, 4, 4), "lm_head": term("lm_head", 9, 4)})
    plan = pair_adapter(base, lora, OPTIONS)
    assert [(pair.key.tensor, pair.key.role, pair.tuned.terms) for pair in plan.pairs] == [
        ("lm_head.weight", "lm_head", (lora.modules["lm_head"],)),
        (f"{q}.weight", "q_proj", (lora.modules[q],)),
    ]
    assert str(plan.notes[0]) == f"'lm_head.weight' has factors of its own: compared with the base's tied '{embed}'"
    for wrong in (term("lm_head", 9, 5), term("lm_head", 8, 4)):
        with pytest.raises(PairingError, match="targets 'lm_head.weight', which base lacks"):
            pair_adapter(base, adapter({"lm_head": wrong}), OPTIONS)


DINO = "encoder.layer.0.mlp.weights_in"


def swiglu():
    """DINOv2's gate and up, which the running model holds as two modules."""
    shapes = {"encoder.layer.0.norm1.weight": (8,), f"{DINO}.weight": (20, 8), f"{DINO}.bias": (20,)}
    return checkpoint(shapes, model_type="dinov2", architectures=["Dinov2Model"])


def test_modules_that_the_base_stores_as_one_pair_by_their_rows():
    base = swiglu()
    gate, up = (f"layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj"))
    homes = find_homes(lay_out(base), [gate, up], Plan())
    places = {path: (found[0][0], found[0][1].part, found[0][1].parts) for path, found in homes.items()}
    assert places == {gate: (f"{DINO}.weight", 0, 2), up: (f"{DINO}.weight", 1, 2)}
    lora = adapter({gate: term(gate, 10, 8), up: term(up, 10, 8)}, biases={up: 10, gate: 10})
    plan = pair_adapter(base, lora, OPTIONS)
    assert [(pair.key.role, pair.tuned.view) for pair in plan.pairs] == [
        ("gate_proj", View((10, 8))),
        ("up_proj", View((10, 8))),
    ]
    assert [pair.tuned.terms[0].lora_A.name for pair in plan.pairs] == [f"{gate}.lora_A", f"{up}.lora_A"]
    assert set(reasons(plan)) == {f"{DINO}.bias"}
    assert plan.vectors == []
    found = pair_split_biases(base, lora)
    assert [(pair.tuned.name, pair.base.name, pair.key.role, start) for pair, start in found] == [
        (f"{gate}.lora_B.bias", f"{DINO}.bias", "bias", 0),
        (f"{up}.lora_B.bias", f"{DINO}.bias", "bias", 10),
    ]


def test_split_biases_are_those_of_split_modules_that_fit():
    base = swiglu()
    gate = "layers.0.mlp.gate_proj"
    lora = adapter({gate: term(gate, 10, 8, scaling=3.0)}, biases={gate: 10})
    (found,) = pair_split_biases(base, lora)
    assert (found[0].scaling, found[0].key.tensor) == (3.0, f"{DINO}.bias")
    assert pair_split_biases(base, adapter({gate: term(gate, 10, 8)}, biases={gate: 9})) == []
    assert pair_split_biases(base, adapter({gate: term(gate, 10, 8)})) == []
    without = {name: found.shape for name, found in base.tensors.items() if not name.endswith("bias")}
    bare = checkpoint(without, **base.config)
    ((pair, start),) = pair_split_biases(bare, lora)
    assert (pair.base, start) == (None, 0)
    whole = adapter({"q_proj": term("q_proj", 4, 4)}, biases={"q_proj": 4})
    assert pair_split_biases(checkpoint({"q_proj.weight": (4, 4), "q_proj.bias": (4,)}), whole) == []


def test_tensors_stored_whole_in_another_layout_are_listed():
    """The stack saved whole against experts one by one, and one of two halves of rows."""
    up = f"{EXPERTS}.gate_up_proj"
    plan = pair_adapter(family("mixtral"), adapter({}, full={up: (3, 80, 24)}), OPTIONS)
    assert plan.pairs == []
    assert len(reasons(plan)) == 6
    assert all("in another layout" in reason for reason in reasons(plan).values())
    gate = "layers.0.mlp.gate_proj"
    plan = pair_adapter(swiglu(), adapter({}, full={f"{gate}.weight": (10, 8)}), OPTIONS)
    assert reasons(plan) == {
        f"{DINO}.weight": "stored whole in the adapter in another layout: compare the merged checkpoints for it"
    }
    whole = "model.layers.0.self_attn.q_proj"
    lora = adapter({whole: term(whole, 24, 24)}, full={f"{whole}.weight": (24, 24), "model.odd.weight": (2, 2)})
    assert reasons(pair_adapter(family("llama"), lora, OPTIONS)) == {
        f"{whole}.weight": "stored whole in the adapter, beside its factors",
        "model.odd.weight": "stored whole in the adapter, and not in the base",
    }


def test_tensors_without_a_difference_and_those_not_chosen_are_listed_with_their_reason():
    q, k = (f"model.layers.0.self_attn.{role}_proj" for role in "qk")
    base = checkpoint({f"{q}.weight": (8, 6), f"{k}.weight": (4, 6), "ids.weight": (5, 6), f"{k}.bias": (4,)})
    base.tensors["ids.weight"] = spec("ids.weight", (5, 6), "I64")
    lora = adapter({q: term(q, 8, 6), k: term(k, 4, 6)}, full={"ids.weight": (5, 6)}, biases={q: 8, k: 4})
    plan = pair_adapter(base, lora, deltaspec.AnalyzeOptions(device="cpu", exclude="k_proj"))
    assert [pair.key.role for pair in plan.pairs] == ["q_proj"]
    assert reasons(plan) == {
        "ids.weight": "dtype I64 is not a floating-point weight",
        f"{k}.weight": "left out by --include or --exclude",
        f"{k}.bias": "left out by --include or --exclude",
    }
    assert [(v.key.tensor, v.key.role, v.base, v.scaling) for v in plan.vectors] == [(f"{q}.bias", "bias", None, 1.0)]


def test_two_adapters_pair_module_by_module():
    q, k, wide = "model.layers.2.self_attn.q_proj", "model.layers.10.self_attn.k_proj", f"{EXPERTS}.down_proj"
    first = adapter(
        {q: term(q, 8, 6, scaling=2.0), wide: term(wide, 6, 9, experts=2)}, "first", full={"score.weight": (2, 6)}
    )
    second = adapter(
        {k: term(k, 4, 6, scaling=5.0), q: term(q, 8, 6, r=2, scaling=3.0)}, "second", biases={q: 8}, base_model="other"
    )
    plan = pair_adapters(first, second, OPTIONS)
    assert [(str(p.key), p.key.role, p.key.depth) for p in plan.pairs] == [
        (f"{wide}/0", "down_proj", 0),
        (f"{wide}/1", "down_proj", 0),
        (f"{q}.weight", "q_proj", 2),
        (f"{k}.weight", "k_proj", 10),
    ]
    scalings = [([t.scaling for t in p.base.terms], [t.scaling for t in p.tuned.terms]) for p in plan.pairs]
    assert scalings == [([1.0], [-1.0])] * 2 + [([2.0], [3.0, -2.0]), ([], [5.0])]
    assert [p.tuned.view.expert for p in plan.pairs] == [0, 1, None, None]
    assert [str(note) for note in plan.notes] == [
        "the adapters name different bases: 'base' and 'other'",
        f"'{wide}' has no factors in the second adapter: zero there",
        f"'{k}.weight' has no factors in the first adapter: zero there",
    ]
    assert {name: reason.partition(":")[0] for name, reason in reasons(plan).items()} == {
        "score.weight": "stored whole in an adapter (modules_to_save)",
        f"{q}.bias": "an adapter's bias",
    }
    left = pair_adapters(first, second, deltaspec.AnalyzeOptions(device="cpu", include="q_proj"))
    assert [p.key.role for p in left.pairs] == ["q_proj"]
    with pytest.raises(PairingError, match=rf"Cannot pair '{q}.weight': base has shape \(8, 6\), tuned has \(8, 7\)"):
        pair_adapters(first, adapter({q: term(q, 8, 7)}), OPTIONS)


@pytest.mark.parametrize(
    ("leaf", "shape", "role"), [("qkv_proj", (48, 24), "qkv_proj"), ("gate_up_proj", (80, 24), "gate_up_proj")]
)
def test_fused_modules_of_two_adapters_stay_whole(leaf, shape, role):
    """Without the base's config their parts cannot be told apart."""
    path = f"model.layers.0.{'mlp' if 'gate' in leaf else 'self_attn'}.{leaf}"
    (pair,) = pair_adapters(*(adapter({path: term(path, *shape)}, ref) for ref in "ab"), OPTIONS).pairs
    assert (pair.key.role, pair.key.part, pair.shape) == (role, "", shape)
