"""Weights that two names share, by content: which of them is compared, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from deltaspec.architecture.match import identify
from deltaspec.io.open import open_source
from deltaspec.pairing.names import align_names
from deltaspec.pairing.tied import find_tied
from deltaspec.types import NoteKind
from tests.families import write

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BODY = {"model.layers.0.mlp.up_proj.weight": torch.ones(6, 4)}


def embedding(seed=0, rows=9):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def tied(folder, base, tuned, mapping=None):
    sides = [open_source(write(folder / name, {**BODY, **state}, {})) for name, state in (("b", base), ("t", tuned))]
    known = identify({name: spec.shape for name, spec in sides[0].tensors.items()}, {})
    mapping = mapping or align_names(sides[0].tensors, sides[1].tensors)[0]
    return find_tied(*sides, mapping, known)


def reasons(found):
    """Every tied name with what is said of it."""
    assert {note.kind for note in found.notes.values()} <= {NoteKind.TIED}
    assert all(note.tensor == name for name, note in found.notes.items())
    return {name: note.text for name, note in found.notes.items()}


@pytest.mark.parametrize("base_same", [True, False])
@pytest.mark.parametrize("tuned_same", [True, False])
def test_tied_is_what_is_equal_in_both(tmp_path, base_same, tuned_same):
    sides = [
        {EMBED: embedding(seed), HEAD: embedding(seed if same else 7)}
        for seed, same in ((0, base_same), (1, tuned_same))
    ]
    found = tied(tmp_path, *sides)
    assert reasons(found) == ({HEAD: f"tied to '{EMBED}'"} if base_same and tuned_same else {})
    assert found.heads == {}


def test_a_head_that_tuning_dropped_or_added(tmp_path):
    both = {EMBED: embedding(), HEAD: embedding()}
    assert reasons(tied(tmp_path / "1", both, {EMBED: embedding(1)})) == {HEAD: f"tied to '{EMBED}'"}
    assert reasons(tied(tmp_path / "2", {EMBED: embedding()}, both)) == {HEAD: f"tied to '{EMBED}'"}
    added = tied(tmp_path / "3", {EMBED: embedding()}, {EMBED: embedding(), HEAD: embedding(2)})
    assert (reasons(added), added.heads) == ({}, {HEAD: EMBED})


@pytest.mark.parametrize("name", ["embed_out.weight", "proj_out.weight", "score.weight", "lm_head.bias"])
def test_only_heads_are_taken_for_embeddings(tmp_path, name):
    shape = (9,) if name.endswith("bias") else (9, 4)
    found = tied(tmp_path, {EMBED: embedding()}, {EMBED: embedding(), name: torch.full(shape, 2.0)})
    assert found.heads == ({name: EMBED} if name in ("embed_out.weight", "proj_out.weight") else {})


def test_a_head_of_another_width_is_no_embeddings(tmp_path):
    """Another number of rows is: a vocabulary grows on both."""
    narrow = tied(tmp_path / "1", {EMBED: embedding()}, {EMBED: embedding(), HEAD: torch.ones(9, 5)})
    assert narrow.heads == {}
    grown = tied(tmp_path / "2", {EMBED: embedding()}, {EMBED: embedding(), HEAD: torch.ones(12, 4)})
    assert grown.heads == {HEAD: EMBED}
    untied = tied(tmp_path / "3", {EMBED: embedding()}, {"other.weight": embedding(), HEAD: torch.ones(9, 4)})
    assert untied.heads == {}  # the embedding itself has no partner


def test_equal_values_of_another_dtype_are_not_one_weight(tmp_path):
    base = {EMBED: torch.ones(9, 4), HEAD: torch.ones(9, 4).bfloat16()}
    assert reasons(tied(tmp_path, base, base)) == {}
    shorter = {EMBED: torch.ones(9, 4), HEAD: torch.ones(8, 4)}
    assert reasons(tied(tmp_path / "s", shorter, {EMBED: torch.ones(9, 4)})) == {}
