"""Pairing by name: prefixes, ties, vocabularies, layouts, and a reason for whatever is left out."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file

import deltaspec
from deltaspec.errors import PairingError
from deltaspec.pairing.names import align_names, natural_order
from deltaspec.workflows.analysis.analyze import make_plan
from tests.families import FAMILIES, random_state, write

OPTIONS = deltaspec.AnalyzeOptions(device="cpu")


def pair(tmp_path, base, tuned, config=None, **options):
    for side, state in (("base", base), ("tuned", tuned)):
        write(tmp_path / side, state, config or {})
    return make_plan(tmp_path / "base", tmp_path / "tuned", deltaspec.AnalyzeOptions(device="cpu", **options))[0]


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reasons(plan):
    return {note.tensor: note.text for note in plan.skipped}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "bert.", "have 'bert.' before those of the base"),
        ("model.", "", "lack the 'model.' of those of the base"),
        ("model.", "model.language_model.", "begin with 'model.language_model.' where those of the base begin with 'm"),
        ("", "module._orig_mod.", "have 'module._orig_mod.' before"),
    ],
)
def test_one_change_of_prefix_pairs_everything(old, new, said):
    names = [f"layers.{i}.{role}.weight" for i in range(3) for role in ("q", "k")]
    mapping, note = align_names([old + n for n in names], [new + n for n in names])
    assert mapping == {old + n: new + n for n in names}
    assert note.startswith(f"names in the tuned model {said}")


def test_equal_names_pair_and_a_few_odd_ones_are_not_forced():
    base = [f"layers.{i}.weight" for i in range(9)] + ["head.dense.weight"]
    tuned = [f"layers.{i}.weight" for i in range(9)] + ["other.head.dense.weight"]
    mapping, note = align_names(base, tuned)
    assert mapping == {n: n for n in base[:9]}
    assert note == ""


def test_equality_wins_a_tie_with_a_change_of_prefix():
    """Two names pair as they are and two under a prefix: the change must pair more, not as many."""
    base = ["layers.0.weight", "layers.1.weight", "layers.2.weight", "layers.3.weight"]
    tuned = [*base[:2], *("model." + name for name in base[2:])]
    assert align_names(base, tuned) == ({name: name for name in base[:2]}, "")
    mapping, note = align_names([*base, "layers.4.weight"], [*tuned, "model.layers.4.weight"])
    assert mapping == {name: name for name in base[:2]} | {
        f"layers.{i}.weight": f"model.layers.{i}.weight" for i in (2, 3, 4)
    }
    assert note


def test_encoder_is_not_taken_for_decoder():
    base = ["encoder.layer.0.weight", "decoder.layer.0.weight"]
    mapping, _ = align_names(base, ["model." + n for n in base])
    assert mapping == {n: "model." + n for n in base}


def test_layer_2_comes_before_layer_10():
    assert sorted(["l.10.w", "l.2.w", "l.1.w"], key=natural_order) == ["l.1.w", "l.2.w", "l.10.w"]


def test_order_in_the_file_does_not_matter(tmp_path):
    state = random_state(FAMILIES["llama"])
    turned = dict(reversed(state.items()))
    plan = pair(tmp_path, state, turned, FAMILIES["llama"].config)
    assert all(p.base.spec.name == p.tuned.spec.name for p in plan.pairs)


def test_everything_left_out_has_its_reason(tmp_path):
    base = {
        "a.weight": matrix(4, 3),
        "gone.weight": matrix(4, 3),
        "ids": torch.arange(6).view(2, 3),
        "none.weight": matrix(0, 3),
    }
    tuned = {
        "a.weight": matrix(4, 3, seed=1),
        "new.weight": matrix(4, 3),
        "ids": torch.arange(6).view(2, 3),
        "none.weight": matrix(0, 3),
    }
    plan = pair(tmp_path, base, tuned)
    assert [str(p.key) for p in plan.pairs] == ["a.weight"]
    found = reasons(plan)
    assert set(found) == {"gone.weight", "new.weight", "ids", "none.weight"}
    assert found["gone.weight"] == "only in the base"
    assert found["new.weight"] == "only in the tuned model"
    assert "I64" in found["ids"]
    assert "no elements" in found["none.weight"]


def test_include_and_exclude(tmp_path):
    state = random_state(FAMILIES["llama"])
    plan = pair(tmp_path, state, state, FAMILIES["llama"].config, include=r"layers\.0\.", exclude="mlp|norm")
    assert {p.key.role for p in plan.pairs} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {p.key.depth for p in plan.pairs} == {0}
    with pytest.raises(PairingError, match="leave nothing"):
        pair(tmp_path, state, state, FAMILIES["llama"].config, include="nowhere")


def test_disjoint_models_do_not_pair(tmp_path):
    with pytest.raises(PairingError, match="Nothing in .* pairs"):
        pair(tmp_path, {"a.b.weight": matrix(2, 2)}, {"c.d.weight": matrix(2, 2)})


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
HEADS_REASON = "a task head of another shape than the base's"
BODY = {"model.layers.0.mlp.up_proj.weight": matrix(6, 4)}


@pytest.mark.parametrize(("in_base", "in_tuned"), [(True, True), (True, False), (False, True)])
def test_a_tied_head_is_compared_once(in_base, in_tuned, tmp_path):
    base, tuned = {**BODY, EMBED: matrix(9, 4)}, {**BODY, EMBED: matrix(9, 4, seed=1)}
    base |= {HEAD: base[EMBED].clone()} if in_base else {}
    tuned |= {HEAD: tuned[EMBED].clone()} if in_tuned else {}
    plan = pair(tmp_path, base, tuned)
    assert [p.key.tensor for p in plan.pairs].count(EMBED) == 1
    assert HEAD not in {p.key.tensor for p in plan.pairs}
    assert reasons(plan) == {HEAD: f"tied to '{EMBED}'"}


def test_an_untied_head_is_compared(tmp_path):
    base, tuned = ({**BODY, EMBED: matrix(9, 4, seed=i), HEAD: matrix(9, 4, seed=i + 5)} for i in (0, 1))
    assert {p.key.tensor for p in pair(tmp_path, base, tuned).pairs} == {EMBED, HEAD, *BODY}


def test_a_head_untied_by_tuning_is_compared_with_the_embedding_it_was(tmp_path):
    base, tuned = {**BODY, EMBED: matrix(9, 4)}, {**BODY, EMBED: matrix(9, 4, seed=1), HEAD: matrix(9, 4, seed=2)}
    plan = pair(tmp_path, base, tuned)
    head = next(p for p in plan.pairs if p.key.role == "lm_head")
    assert (head.base.spec.name, head.tuned.spec.name) == (EMBED, HEAD)
    assert any("tied" in str(note) for note in plan.notes)


def test_pickled_weights_that_share_memory_are_compared_once(tmp_path):
    for side in ("base", "tuned"):
        embed = matrix(9, 4, seed=len(side))
        (tmp_path / side).mkdir()
        torch.save({**BODY, EMBED: embed, HEAD: embed}, tmp_path / side / "pytorch_model.bin")
    plan = make_plan(tmp_path / "base", tmp_path / "tuned", OPTIONS)[0]
    assert len(plan.pairs) == 2
    assert len(plan.skipped) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_any_matrices_that_share_memory_are_compared_once(shared, tmp_path):
    """Layers that share weights (ALBERT's way) and are no head: three names, one matrix."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    for side in ("base", "tuned"):
        one = matrix(4, 4, seed=len(side))
        others = [one if shared or side == "base" else matrix(4, 4, seed=i) for i in (7, 8)]
        (tmp_path / side).mkdir()
        torch.save(dict(zip(names, [one, *others], strict=True)), tmp_path / side / "pytorch_model.bin")
    plan = make_plan(tmp_path / "base", tmp_path / "tuned", OPTIONS)[0]
    assert [pair.key.tensor for pair in plan.pairs] == (names[:1] if shared else names)
    assert reasons(plan) == (dict.fromkeys(names[1:], f"tied to '{names[0]}'") if shared else {})


def test_a_grown_vocabulary_stops_with_the_way_out(tmp_path):
    base, tuned = {**BODY, EMBED: matrix(9, 4)}, {**BODY, EMBED: matrix(11, 4)}
    with pytest.raises(PairingError) as stopped:
        pair(tmp_path, base, tuned)
    said = str(stopped.value)
    assert said.startswith(f"Cannot pair '{EMBED}': base has shape (9, 4), tuned has (11, 4).")
    assert "--vocab common" in said
    plan = pair(tmp_path, base, tuned, vocab="common")
    grown = next(p for p in plan.pairs if p.key.tensor == EMBED)
    assert grown.shape == (9, 4)
    assert any("first 9 rows" in str(note) for note in plan.notes)


def test_the_common_rows_are_the_first_ones(tmp_path):
    base = {**BODY, EMBED: matrix(9, 4)}
    tuned = {**BODY, EMBED: torch.cat([base[EMBED] + 1, matrix(2, 4)])}
    folders = [write(tmp_path / side, state, {}) for side, state in (("b", base), ("t", tuned))]
    options = deltaspec.AnalyzeOptions(device="cpu", vocab="common")
    run = deltaspec.analyze(*folders, tmp_path / "run", options=options)
    found = next(r for r in run.records if r.key.tensor == EMBED)
    assert found.shape == (9, 4)
    assert found.metrics["spectral_norm"] == pytest.approx(6.0, rel=1e-6)


def test_other_shapes_stop_and_name_exclude(tmp_path):
    with pytest.raises(PairingError, match=r"--exclude 'model\\\.layers"):
        pair(tmp_path, BODY, {next(iter(BODY)): matrix(6, 5)})


def test_a_task_head_of_other_classes_is_left_out_of_an_analysis_only(tmp_path):
    """Whatever --vocab says; a matrix inside the body of another shape still stops."""
    heads = {n: {"score.weight": matrix(n, 4), "score.bias": torch.zeros(n)} for n in (2, 3)}
    base, tuned = {**BODY, **heads[3]}, {n: t + 1 for n, t in {**BODY, **heads[2]}.items()}
    folders = [write(tmp_path / side, state, {}) for side, state in (("b", base), ("t", tuned))]
    for vocab in ("strict", "common"):
        options = deltaspec.AnalyzeOptions(device="cpu", vocab=vocab)
        run = deltaspec.analyze(*folders, tmp_path / vocab, options=options)
        assert {r.key.tensor for r in run.records} == set(BODY)
        assert {row["tensor"]: row["reason"] for row in run.skipped} == dict.fromkeys(heads[2], HEADS_REASON)
        with pytest.raises(PairingError, match=r"Cannot pair 'score.*base has shape \(3"):
            make_plan(*folders, options)
    body = {n: matrix(7, 4) for n in BODY}
    with pytest.raises(PairingError, match="up_proj.weight': base has shape"):
        deltaspec.analyze(folders[0], write(tmp_path / "o", body, {}), tmp_path / "run", options=OPTIONS)


@pytest.mark.parametrize("stacked", ["mixtral", "qwen3_moe"])
def test_experts_stacked_in_one_model_alone_still_pair(stacked, tmp_path):
    """One matrix for each expert and role, the same numbers on both sides."""
    one, many = FAMILIES[stacked], FAMILIES[f"{stacked}_stacked"]
    base = random_state(one)
    tuned = {name: tensor for name, tensor in random_state(many).items() if "experts" in name}
    plan = pair(tmp_path, {n: t for n, t in base.items() if "experts" in n}, tuned, one.config)
    assert len(plan.pairs) == sum("experts" in name for name in base)
    assert any("laid out differently" in str(note) for note in plan.notes)
    assert not plan.skipped


def test_a_single_file_pairs_with_a_folder(tmp_path):
    save_file(BODY, tmp_path / "base.safetensors")
    write(tmp_path / "tuned", BODY, {})
    assert len(make_plan(tmp_path / "base.safetensors", tmp_path / "tuned", OPTIONS)[0].pairs) == 1


def test_no_layer_is_taken_for_another():
    """Two shards of one model: layer 0 is not layer 7, and layers 0 to 3 are not 4 to 7."""
    roles = ("q", "k", "v")
    base = [f"layers.{i}.{r}.weight" for i in range(4) for r in roles]
    tuned = [f"layers.{i}.{r}.weight" for i in range(4, 8) for r in roles]
    assert align_names(base, tuned) == ({}, "")


def test_many_experts_align_in_a_moment():
    names = [f"layers.{i}.experts.{e}.{r}.weight" for i in range(12) for e in range(64) for r in ("up", "gate", "down")]
    start = time.process_time()
    mapping, _ = align_names(["model." + n for n in names], ["model.language_model." + n for n in names])
    assert len(mapping) == len(names)
    assert time.process_time() - start < 2


def test_a_prefix_change_leaves_nothing_open(tmp_path):
    """What paired under a prefix is settled: not listed again, and not paired a second time."""
    base = {f"model.layers.{i}.self_attn.q_proj.weight": matrix(4, 4, seed=i) for i in range(3)}
    tuned = {name.replace("model.", "model.language_model."): t + 1 for name, t in base.items()}
    tuned["mtp.layers.0.self_attn.q_proj.weight"] = matrix(4, 4, seed=9)
    plan = pair(tmp_path, base, tuned, {"model_type": "llama"})
    assert [str(p.key) for p in plan.pairs] == list(base)
    assert reasons(plan) == {"mtp.layers.0.self_attn.q_proj.weight": "only in the tuned model"}


def test_what_pairs_in_part_lists_the_rest(tmp_path):
    """A fused gate and up against a gate alone: the gate is compared, the up listed."""
    prefix = "model.layers.0.mlp."
    config = {"model_type": "phi3", "num_attention_heads": 2, "hidden_size": 4}
    fused = {f"{prefix}gate_up_proj.weight": matrix(12, 4)}
    plan = pair(tmp_path, fused, {f"{prefix}gate_proj.weight": matrix(6, 4, seed=1)}, config)
    assert [p.key.role for p in plan.pairs] == ["gate_proj"]
    assert reasons(plan) == {f"{prefix}gate_up_proj.weight/up_proj": "only in the base"}


@pytest.mark.parametrize("apart", ["base", "tuned"])
def test_weights_tied_in_one_model_alone_are_both_compared(apart, tmp_path):
    """Shared memory in one .bin, two tensors in the other: the second is no copy of the first any more."""
    for side in ("base", "tuned"):
        embed = matrix(9, 4, seed=len(side))
        (tmp_path / side).mkdir()
        head = matrix(9, 4, seed=7) if side == apart else embed
        torch.save({**BODY, EMBED: embed, HEAD: head}, tmp_path / side / "pytorch_model.bin")
    plan = make_plan(tmp_path / "base", tmp_path / "tuned", OPTIONS)[0]
    assert {p.key.tensor for p in plan.pairs} == {EMBED, HEAD, *BODY}
    assert not plan.skipped


def test_a_tied_head_is_compared_where_the_embedding_is_left_out(tmp_path):
    base, tuned = {**BODY, EMBED: matrix(9, 4)}, {**BODY, EMBED: matrix(9, 4, seed=1)}
    plan = pair(tmp_path, {**base, HEAD: base[EMBED].clone()}, {**tuned, HEAD: tuned[EMBED].clone()}, include="lm_head")
    assert [p.key.tensor for p in plan.pairs] == [HEAD]


def test_two_matrices_of_one_key_are_refused(tmp_path):
    state = {"w": matrix(3, 3), "w#base": matrix(3, 3)}
    folders = [write(tmp_path / side, state, {}) for side in ("b", "t")]
    with pytest.raises(PairingError, match="stored as 'w#base'"):
        deltaspec.analyze(*folders, tmp_path / "r", options=deltaspec.AnalyzeOptions(spectra=("delta", "base")))


def test_a_very_long_number_in_a_name_is_no_crash(tmp_path):
    name = f"layers.{'9' * 5000}.weight"
    assert len(pair(tmp_path, {name: matrix(3, 2)}, {name: matrix(3, 2, seed=1)}).pairs) == 1
