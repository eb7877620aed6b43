"""From pairs to modules: what is joined, what stays apart, and what no adapter can hold."""

from __future__ import annotations

import numpy as np
import pytest

import deltaspec
from deltaspec.pairing.adapters import pair_adapters
from deltaspec.pairing.dense import pair_checkpoints
from deltaspec.pairing.modules import group_modules, grown_rows
from deltaspec.types import LowRankSource, MatrixKey, MatrixSource, View, WeightPair
from tests.pairing.headers import adapter, checkpoint, family, spec, term

OPTIONS = deltaspec.AnalyzeOptions(device="cpu")


def grouped(base, tuned=None, *, split=False):
    tuned = tuned or checkpoint({n: s.shape for n, s in base.tensors.items()}, "tuned", **base.config)
    modules, left = group_modules(pair_checkpoints(base, tuned, OPTIONS), base, split_fused=split)
    return {module.name: module for module in modules}, left


def roles(module):
    return [pair.key.role for pair in module.pairs]


# Family, tensor → kind, (d_out, d_in), roles of the parts, role of the whole.
FUSED = {
    ("phi3", "model.layers.0.self_attn.qkv_proj"): ("linear", (48, 24), "qkv"),
    ("phi3", "model.layers.0.mlp.gate_up_proj"): ("linear", (80, 24), ["gate_proj", "up_proj"]),
    ("gpt2", "h.0.attn.c_attn"): ("conv1d", (72, 24), "qkv"),
    ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"): ("linear", (72, 24), "qkv"),
    ("falcon_multi_query", "transformer.h.0.self_attention.query_key_value"): ("linear", None, "qkv"),
}


@pytest.mark.parametrize(("name", "path"), FUSED)
def test_parts_of_a_fused_matrix_are_one_module(name, path):
    kind, shape, parts = FUSED[name, path]
    base = family(name)
    tensor = next(n for n in base.tensors if n.endswith(f"{path.removeprefix('transformer.')}.weight"))
    parts = ["q_proj", "k_proj", "v_proj"] if parts == "qkv" else parts
    stored = base.tensors[tensor].shape
    shape = shape or stored
    apart = grouped(base, split=True)[0][tensor]
    assert (apart.kind, apart.shape, roles(apart)) == (kind, shape, parts)
    assert sum(pair.shape[0] for pair in apart.pairs) == shape[0]
    whole = grouped(base)[0][tensor]
    assert (whole.kind, whole.shape, whole.path) == (kind, shape, tensor.removesuffix(".weight"))
    (pair,) = whole.pairs
    assert pair.key.role == ("qkv_proj" if len(parts) == 3 else "gate_up_proj")
    assert (pair.key.part, pair.shape, pair.guessed) == ("", shape, False)
    assert pair.base.view == pair.tuned.view == View(shape, transposed=kind == "conv1d")
    assert pair.key.depth == apart.pairs[0].key.depth


def test_parts_that_the_tuned_side_stores_apart_stay_apart():
    base = family("phi3")
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    shapes = {n: s.shape for n, s in base.tensors.items() if n != fused}
    shapes |= {f"model.layers.0.self_attn.{r}_proj.weight": (s, 24) for r, s in (("q", 24), ("k", 12), ("v", 12))}
    modules, left = grouped(base, checkpoint(shapes, "tuned", **base.config))
    assert (roles(modules[fused]), modules[fused].shape, left) == (["q_proj", "k_proj", "v_proj"], (48, 24), {})
    gone = {n: s for n, s in shapes.items() if not n.endswith("0.self_attn.v_proj.weight")}
    modules, _ = grouped(base, checkpoint(gone, "tuned", **base.config))
    assert (roles(modules[fused]), modules[fused].shape) == (["q_proj", "k_proj"], (48, 24))


def test_a_part_left_out_keeps_the_others_apart():
    """All that is compared lies in one tensor, but it is not all of that tensor."""
    base = family("phi3")
    plan = pair_checkpoints(base, family("phi3", "tuned"), OPTIONS)
    plan.pairs = [pair for pair in plan.pairs if pair.key.role != "v_proj"]
    modules = {module.name: module for module in group_modules(plan, base, split_fused=False)[0]}
    assert roles(modules["model.layers.0.self_attn.qkv_proj.weight"]) == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "transposed"),
    [
        ("mixtral_stacked", "model.layers.0.mlp.experts.gate_up_proj", (80, 24), False),
        ("mixtral_stacked", "model.layers.1.mlp.experts.down_proj", (24, 40), False),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (80, 24), True),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", (24, 40), True),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_a_stack_is_one_module_of_an_expert_after_the_other(name, tensor, shape, transposed, split):
    module = grouped(family(name), split=split)[0][tensor]
    assert (module.path, module.kind, module.shape, module.transposed) == (tensor, "stack", shape, transposed)
    assert [pair.base.view.expert for pair in module.pairs] == [0, 1, 2]
    assert [pair.key.expert for pair in module.pairs] == [0, 1, 2]
    assert {pair.key.role for pair in module.pairs} == {tensor.rpartition(".")[2]}
    assert {pair.shape for pair in module.pairs} == {shape}
    for pair in module.pairs:
        assert pair.tuned.view == View(shape, expert=pair.key.expert, transposed=transposed)


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "shape", "kernel"),
    [
        ("llama", "model.embed_tokens.weight", "embedding", (48, 24), ()),
        ("bert", "bert.embeddings.token_type_embeddings.weight", "embedding", None, ()),
        ("gpt2", "wpe.weight", "embedding", None, ()),
        ("llama", "model.layers.0.mlp.down_proj.weight", "linear", (24, 40), ()),
        ("gpt2", "h.1.mlp.c_fc.weight", "conv1d", None, ()),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight", "conv", None, True),
    ],
)
def test_kinds_of_modules(name, tensor, kind, shape, kernel):
    base = family(name)
    tensor = next(n for n in base.tensors if n.endswith(tensor))
    stored = base.tensors[tensor].shape
    module = grouped(base)[0][tensor]
    default = stored[::-1] if kind == "conv1d" else (stored[0], int(np.prod(stored[1:])))
    assert (module.kind, module.shape) == (kind, shape or default)
    assert module.kernel == (stored[1:] if kernel else ())
    assert module.path == tensor.removesuffix(".weight")
    assert [pair.shape for pair in module.pairs] == [module.shape]


def test_what_no_adapter_can_hold_is_named():
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (8, 6),
        "model.bare": (5, 6),
        "model.layers.0.q_norm.weight": (2, 6),
    }
    base = checkpoint(shapes)
    plan = pair_checkpoints(base, checkpoint(shapes, "tuned"), OPTIONS)
    key = MatrixKey("model.layers.0.q_norm.weight", role="norm", depth=0)
    plan.pairs = [pair for pair in plan.pairs if "norm" not in pair.key.tensor]
    source = MatrixSource(base.tensors[key.tensor], View((2, 6)))
    plan.pairs.append(WeightPair(key, (2, 6), source, source))
    modules, left = group_modules(plan, base, split_fused=False)
    assert [module.name for module in modules] == ["model.layers.0.self_attn.q_proj.weight"]
    assert left["model.bare"].startswith("a bare parameter")
    assert left[key.tensor].startswith("a normalisation")
    assert len(left) == 2


def test_of_two_adapters_every_matrix_is_a_linear_module():
    """No stored base says more, and bare parameters are what the adapter says they are."""
    path = "model.layers.0.self_attn.q_proj"
    one, other = (adapter({path: term(path, 8, 6), "odd": term("odd", 5, 6)}, ref) for ref in ("one", "other"))
    modules, left = group_modules(pair_adapters(one, other, OPTIONS), checkpoint({}), split_fused=False)
    assert left == {}
    assert [(m.name, m.path, m.kind, m.shape) for m in modules] == [
        (f"{path}.weight", path, "linear", (8, 6)),
        ("odd.weight", "odd", "linear", (5, 6)),
    ]
    assert all(isinstance(m.pairs[0].base, LowRankSource) for m in modules)


def test_a_head_that_the_base_ties_is_a_module_of_its_own():
    """Its pair reads the embedding of the base; as a module it is the head."""
    embed = "model.embed_tokens.weight"
    base = checkpoint({embed: (9, 4)})
    plan = pair_checkpoints(base, checkpoint({embed: (9, 4)}, "tuned"), OPTIONS)
    source = plan.pairs[0].base
    plan.pairs.append(WeightPair(MatrixKey("lm_head.weight", role="lm_head"), (9, 4), source, plan.pairs[0].tuned))
    modules, _ = group_modules(plan, base, split_fused=False)
    assert [(module.name, module.kind) for module in modules] == [(embed, "embedding"), ("lm_head.weight", "linear")]


@pytest.mark.parametrize("guessed", [(False, False), (True, False), (False, True)])
def test_a_whole_is_guessed_where_any_part_is(guessed):
    base = checkpoint({"x.0.gate_up_proj.weight": (8, 4)})
    stored = base.tensors["x.0.gate_up_proj.weight"]
    views = View((4, 4), stop=4), View((4, 4), start=4, stop=8)
    pairs = [
        WeightPair(
            MatrixKey(stored.name, role, role, 0), (4, 4), MatrixSource(stored, view), MatrixSource(stored, view), guess
        )
        for role, view, guess in zip(("gate_proj", "up_proj"), views, guessed, strict=True)
    ]
    plan = pair_checkpoints(checkpoint({"a.weight": (2, 2)}), checkpoint({"a.weight": (2, 2)}), OPTIONS)
    plan.pairs = pairs
    (module,), _ = group_modules(plan, base, split_fused=False)
    assert [pair.guessed for pair in module.pairs] == [any(guessed)]


def test_rows_that_only_the_tuned_vocabulary_has():
    base, tuned = spec("e", (9, 4)), spec("e", (12, 4))

    def grown(stored=tuned, *, rows=9, stop=9, part="", **view):
        pair = WeightPair(
            MatrixKey("e", part, "embed"),
            (rows, 4),
            MatrixSource(base, View((rows, 4))),
            MatrixSource(stored, View((rows, 4), stop=stop, **view)),
        )
        return grown_rows(pair)

    assert grown() == (9, 12)
    assert grown(spec("e", (9, 4))) is None  # both have all rows
    assert grown(stop=None) is None
    assert grown(stop=8) is None  # not cut where the base ends
    assert grown(part="q") is None
    assert grown(expert=0) is None
    assert grown(transposed=True) is None
    low = LowRankSource((), View((9, 4), stop=9))
    assert grown_rows(WeightPair(MatrixKey("e"), (9, 4), MatrixSource(base, View((9, 4))), low)) is None
