"""What a plan says: choices by name, reasons, the sentences for shapes that disagree, and the order of pairs."""

from __future__ import annotations

import pytest

import deltaspec
from deltaspec.errors import PairingError
from deltaspec.pairing.dense import pair_checkpoints
from deltaspec.pairing.plan import Plan, chosen, refuse_empty, refuse_shapes, unreadable
from tests.pairing.headers import checkpoint, family, spec
from tests.pairing.test_pairing import reasons

OPTIONS = deltaspec.AnalyzeOptions(device="cpu")
Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("", "", "abc"),
        ("a|b", "", "ab"),
        ("", "b", "ac"),
        ("a|b", "b", "a"),
        ("b", "b", ""),
    ],
)
def test_names_must_be_included_and_not_excluded(include, exclude, names):
    options = deltaspec.AnalyzeOptions(device="cpu", include=include, exclude=exclude)
    assert [name for name in "abc" if chosen(f"x.{name}", options)] == list(names)


def test_what_has_no_difference():
    assert unreadable(spec("a", (2, 3), "BF16")) == ""
    assert unreadable(spec("a", (2, 0), "BF16")) == unreadable(spec("a", (0,), "F64")) == "it has no elements"
    assert unreadable(spec("a", (), "F32")) == ""
    assert unreadable(spec("a", (2, 0), "I8")) == "dtype I8 is not a floating-point weight"


def test_shapes_that_disagree_are_counted_and_the_first_is_named():
    assert refuse_shapes([], vocabulary=True) is None
    wrong = [("a.b", (2, 3), (4, 3)), ("c", (1,), (2,)), ("d", (1,), (2,))]
    with pytest.raises(PairingError, match=r"^Cannot pair 'a\.b': base has shape \(2, 3\), tuned has \(4, 3\)\. Check"):
        refuse_shapes(wrong[:1], vocabulary=False)
    with pytest.raises(PairingError, match=r"tuned has \(4, 3\) \(and 2 more tensors differ\)\. Pass --vocab common"):
        refuse_shapes(wrong, vocabulary=True)


def test_a_plan_of_nothing_says_what_stood_in_the_way():
    base, tuned = checkpoint({}, "one"), checkpoint({}, "two")
    empty = pair_checkpoints(base, tuned, OPTIONS)
    with pytest.raises(PairingError, match=r"Nothing in one pairs with two \(for example 'nothing': empty\)"):
        refuse_empty(empty, base, tuned)
    shapes = {"x.0.weight": (2, 2), "y.1.weight": (2, 2)}
    apart = checkpoint(shapes, "one"), checkpoint({"z.7.bias": (3,)}, "two")
    with pytest.raises(PairingError, match=r"example 'x\.0\.weight': only in the base"):
        refuse_empty(pair_checkpoints(*apart, OPTIONS), *apart)
    excluded = deltaspec.AnalyzeOptions(device="cpu", exclude=".")
    same = checkpoint(shapes, "one"), checkpoint(shapes, "two")
    with pytest.raises(PairingError, match="--include and --exclude leave nothing of one to compare"):
        refuse_empty(pair_checkpoints(*same, excluded), *same)
    vectors = checkpoint({"a.norm.weight": (3,)}, "one"), checkpoint({"a.norm.weight": (3,)}, "two")
    plan = pair_checkpoints(*vectors, OPTIONS)
    assert (len(plan.pairs), len(plan.vectors)) == (0, 1)
    refuse_empty(plan, *vectors)
    refuse_empty(pair_checkpoints(*same, OPTIONS), *same)
    assert Plan().skipped == []


def test_pairs_and_reasons_are_in_natural_order():
    names = [Q.format(i) for i in (10, 2, 1)]
    tuned = dict.fromkeys(names, (4, 4))
    base = tuned | {f"gone.{i}.weight": (4, 3) for i in (11, 9)}
    tuned = tuned | {f"new.{i}.weight": (4, 2) for i in (12, 3)}
    plan = pair_checkpoints(checkpoint(base), checkpoint(tuned, "tuned"), OPTIONS)
    assert [pair.key.depth for pair in plan.pairs] == [1, 2, 10]
    assert list(reasons(plan)) == ["gone.9.weight", "gone.11.weight", "new.3.weight", "new.12.weight"]


def test_excluded_pairs_are_kept_with_both_sides():
    shapes = {Q.format(0): (4, 4), "ids": (2, 2)}
    base, tuned = checkpoint(shapes | {"gone": (1, 1)}), checkpoint(shapes, "tuned")
    base.tensors["ids"] = spec("ids", (2, 2), "I64")
    plan = pair_checkpoints(base, tuned, deltaspec.AnalyzeOptions(device="cpu", include="nothing"))
    assert plan.excluded == {Q.format(0): (base.tensors[Q.format(0)], tuned.tensors[Q.format(0)])}
    assert set(reasons(plan).values()) == {"left out by --include or --exclude"}


@pytest.mark.parametrize(
    ("base", "tuned", "noted"),
    [
        ("BF16", "F32", True),
        ("F16", "F32", True),
        ("F32", "BF16", False),
        ("BF16", "BF16", False),
        ("F16", "BF16", False),
    ],
)
def test_a_base_coarser_than_the_tuned_side_is_noted(base, tuned, noted):
    plan = pair_checkpoints(family("phi3", dtype=base), family("phi3", "tuned", dtype=tuned), OPTIONS)
    wanted = f"{len(plan.pairs)} matrices are {base} in the base and {tuned} in the tuned model"
    assert [str(note).startswith(wanted) for note in plan.notes] == [True] * noted


def test_a_quantised_base_is_no_coarser_base():
    """Its rounding is modelled."""
    plan = pair_checkpoints(family("phi3", dtype="F8_E4M3"), family("phi3", "tuned", dtype="BF16"), OPTIONS)
    assert plan.notes == []


@pytest.mark.parametrize(
    ("base", "tuned", "vocab", "rows"),
    [
        ((9, 4), (12, 4), "common", 9),
        ((12, 4), (9, 4), "common", 9),
        ((9, 4), (12, 4), "strict", None),
        ((9, 4), (12, 5), "common", None),
        ((9, 4), (9, 4, 1), "common", None),
    ],
)
def test_common_rows_of_a_vocabulary(base, tuned, vocab, rows):
    embed = "model.embed_tokens.weight"
    sides = checkpoint({embed: base, Q.format(0): (4, 4)}), checkpoint({embed: tuned, Q.format(0): (4, 4)}, "tuned")
    options = deltaspec.AnalyzeOptions(device="cpu", vocab=vocab)
    if rows is None:
        with pytest.raises(PairingError, match="Cannot pair"):
            pair_checkpoints(*sides, options)
        return
    plan = pair_checkpoints(*sides, options)
    pair = next(pair for pair in plan.pairs if pair.key.role == "embed")
    assert pair.shape == pair.base.view.shape == pair.tuned.view.shape == (rows, 4)
    assert (pair.base.view.start, pair.base.view.stop, pair.tuned.view.stop) == (0, rows, rows)
    said = f"'{embed}': the first 9 rows are compared, base has {base[0]}, tuned {tuned[0]}"
    assert [str(note) for note in plan.notes] == [said]


def test_other_matrices_have_no_common_rows():
    sides = (checkpoint({Q.format(0): (rows, 4)}, str(rows)) for rows in (4, 6))
    with pytest.raises(PairingError, match="Check that the base is the one"):
        pair_checkpoints(*sides, deltaspec.AnalyzeOptions(device="cpu", vocab="common"))


def test_a_vector_has_common_rows_where_it_is_a_bias():
    head = {"lm_head.weight": (9, 4), "lm_head.bias": (9,)}
    more = {"lm_head.weight": (12, 4), "lm_head.bias": (12,)}
    options = deltaspec.AnalyzeOptions(device="cpu", vocab="common")
    plan = pair_checkpoints(checkpoint(head), checkpoint(more, "tuned"), options)
    assert [(vector.key.tensor, vector.rows) for vector in plan.vectors] == [("lm_head.bias", 9)]
    assert [pair.shape for pair in plan.pairs] == [(9, 4)]


@pytest.mark.parametrize(
    ("names", "roles", "said"),
    [
        (
            ("trunk.3.q_proj.weight", "odd.weight"),
            ["odd", "q_proj"],
            "1 of 2 matrices is in no known family: taken for what its module is called ('odd.weight' for odd)",
        ),
        (
            ("trunk.3.W1.weight", "trunk.3.W_out.weight"),
            ["W1", "W_out"],
            "2 of 2 matrices are in no known family: taken for what their modules are called (for example "
            "'trunk.3.W1.weight' for W1 of block 3)",
        ),
    ],
)
def test_names_of_no_known_family_are_said_to_be_guessed_in_one_line(names, roles, said):
    shapes = dict.fromkeys(names, (4, 4))
    plan = pair_checkpoints(checkpoint(shapes), checkpoint(shapes, "tuned"), OPTIONS)
    assert [str(note) for note in plan.notes] == [said]
    assert [pair.key.role for pair in plan.pairs] == roles


def test_a_name_outside_the_vocabulary_is_no_place_to_pair_by():
    base, tuned = {"a.0.first.W1.weight": (4, 4)}, {"b.0.second.W1.weight": (4, 4)}
    shared = {"norm.weight": (4,)}
    plan = pair_checkpoints(checkpoint(base | shared), checkpoint(tuned | shared, "tuned"), OPTIONS)
    assert plan.pairs == []
    assert {note.tensor for note in plan.skipped} == {*base, *tuned}
