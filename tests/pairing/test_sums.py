"""Sums of adapters: which terms each module gets, by what factor, and what is refused."""

from __future__ import annotations

import pytest

from deltaspec.errors import PairingError
from deltaspec.pairing.sums import sum_adapters
from tests.pairing.headers import adapter, term

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj"
UP = "model.layers.2.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def scalings(module):
    return [found.scaling for found in module.pairs[0].tuned.terms]


def test_each_module_gets_a_term_of_each_adapter_that_has_it():
    one = adapter({Q: term(Q, 8, 6, scaling=2.0), DOWN: term(DOWN, 6, 9)}, "one")
    other = adapter({UP: term(UP, 9, 6, scaling=5.0), Q: term(Q, 8, 6, r=2, scaling=3.0)}, "other")
    total = sum_adapters([one, other], [0.5, -1.0])
    assert [module.path for module in total.modules] == [Q, UP, DOWN]  # layer 2 before layer 10
    assert [module.name for module in total.modules] == [f"{path}.weight" for path in (Q, UP, DOWN)]
    assert [scalings(module) for module in total.modules] == [[1.0, -3.0], [-5.0], [0.5]]
    assert [module.shape for module in total.modules] == [(8, 6), (9, 6), (6, 9)]
    assert {module.kind for module in total.modules} == {"linear"}
    assert [module.pairs[0].key.role for module in total.modules] == ["q_proj", "up_proj", "down_proj"]
    assert [module.pairs[0].key.depth for module in total.modules] == [0, 2, 10]
    for module in total.modules:
        (pair,) = module.pairs
        assert (pair.base.terms, pair.shape, pair.key.tensor) == ((), module.shape, module.name)
        assert (pair.key.part, pair.key.expert) == ("", None)
    assert total.notes == []


def test_biases_are_scaled_and_weighted():
    one = adapter({Q: term(Q, 8, 6, scaling=2.0)}, biases={Q: 8})
    other = adapter({Q: term(Q, 8, 6, scaling=3.0), UP: term(UP, 9, 6)}, biases={Q: 8, UP: 9})
    total = sum_adapters([one, other], [0.5, -1.0])
    assert {path: [factor for _, factor in found] for path, found in total.biases.items()} == {
        Q: [1.0, -3.0],
        UP: [-1.0],
    }
    assert total.biases[UP][0][0].shape == (9,)


def test_whole_tensors_pass_alone_and_unweighted_only():
    index = adapter({Q: term(Q, 8, 6)}, full={"score.weight": (2, 6), "norm.weight": (6,)})
    assert sum_adapters([index], [1.0]).full == index.full
    for adapters, weights in (([index], [0.5]), ([index, adapter({Q: term(Q, 8, 6)})], [1.0, 1.0])):
        with pytest.raises(PairingError, match="lora stores 'norm.weight' whole"):
            sum_adapters(adapters, weights)


def test_different_bases_are_noted_once_and_sorted():
    adapters = [adapter({Q: term(Q, 8, 6)}, base_model=name) for name in ("b", "a", "b")]
    assert sum_adapters(adapters, [1.0] * 3).notes == ["the adapters name different bases: 'a', 'b'"]
    assert sum_adapters(adapters[::2], [1.0] * 2).notes == []


def test_kinds_of_modules():
    conv = "unet.conv_in"
    index = adapter(
        {
            "wte": term("wte", 48, 6, embedding=True),
            conv: term(conv, 8, 4, kernel=(3, 3)),
            EXPERTS: term(EXPERTS, 6, 9, experts=3),
            "router.weight": term("router.weight", 3, 6),
        }
    )
    found = {module.path: module for module in sum_adapters([index], [1.0]).modules}
    assert {path: module.kind for path, module in found.items()} == {
        "wte": "embedding",
        conv: "conv",
        EXPERTS: "stack",
        "router.weight": "linear",
    }
    assert (found["wte"].shape, found["wte"].kernel) == ((48, 6), ())
    assert (found[conv].shape, found[conv].kernel) == ((8, 36), (4, 3, 3))
    assert found["router.weight"].name == "router.weight"
    stack = found[EXPERTS]
    assert (stack.name, stack.shape, stack.kernel) == (EXPERTS, (6, 9), ())
    assert [pair.key.expert for pair in stack.pairs] == [pair.tuned.view.expert for pair in stack.pairs] == [0, 1, 2]
    turned = adapter({"h.0.attn.c_attn": term("h.0.attn.c_attn", 72, 24)}, fan_in_fan_out=True)
    assert [module.kind for module in sum_adapters([turned], [1.0]).modules] == ["conv1d"]


@pytest.mark.parametrize(
    ("path", "shape", "role"),
    [
        ("model.layers.0.self_attn.qkv_proj", (48, 24), "qkv_proj"),
        ("model.layers.0.mlp.gate_up_proj", (80, 24), "gate_up_proj"),
        ("something.unheard_of", (5, 6), "unheard_of"),
    ],
)
def test_a_fused_module_is_named_as_a_whole(path, shape, role):
    (module,) = sum_adapters([adapter({path: term(path, *shape)})], [1.0]).modules
    (pair,) = module.pairs
    assert (pair.key.role, pair.key.part, pair.shape) == (role, "", shape)


@pytest.mark.parametrize(
    "other",
    [
        term(Q, 8, 7),
        term(Q, 9, 6),
        term(Q, 8, 6, embedding=True),
        term(Q, 8, 6, experts=2),
        term(Q, 8, 2, kernel=(3, 1)),
    ],
)
def test_modules_of_other_shapes_or_kinds_are_refused(other):
    """6 = 2·3·1 inputs: a convolution of this size is another kind of module."""
    adapters = [adapter({Q: term(Q, 8, 6)}, "one"), adapter({Q: other}, "two")]
    for pair in (adapters, adapters[::-1]):
        with pytest.raises(PairingError, match=f"Cannot add '{Q}' of {pair[1].ref} to that of {pair[0].ref}"):
            sum_adapters(pair, [1.0, 1.0])
    third = [adapters[0], adapters[0], adapters[1]]
    with pytest.raises(PairingError, match="of two to that of one"):
        sum_adapters(third, [1.0] * 3)
