"""Rows, classes, held-out parts, token ids and batches, against hand-made files and brute force."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.errors import CheckpointError, OptionError
from deltaspec.io import data_rows
from deltaspec.options import TextOptions
from deltaspec.options.training import DataOptions
from deltaspec.training.data.examples import Batches, Examples, Share, encode, padding
from deltaspec.training.data.table import Table, split_table
from deltaspec.workflows.shared.text_batches import Intake, Text, make_batches
from deltaspec.workflows.training.read_data import read_examples, read_split, read_table
from tests.tiny_models import write_text, write_tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "data"
TEXTS = ["the cat sat", "NA", 'a "red" hat', "old, new", "the dog ran far"]
CLASSES = ["pet", "none", "hat", "none", "pet"]
LM = DataOptions(task="causal-lm", length=8)


def tokenizer(folder, *, causal=False):
    write_tokenizer(folder, causal=causal)
    return transformers.AutoTokenizer.from_pretrained(folder)


def write(folder, name):
    """The same rows in every format."""
    path = folder / name
    pairs = list(zip(TEXTS, CLASSES, strict=True))
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": TEXTS, "label": CLASSES}).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows([("text", "label"), *pairs])
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(pair) for pair in [("text", "label"), *pairs]), encoding="utf-8")
    else:
        found = [{"label": kind, "more": [1], "text": text} for text, kind in pairs]
        lines = json.dumps(found) if path.suffix == ".json" else "\n".join(map(json.dumps, found))
        path.write_text(lines, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_texts_and_classes(tmp_path, name):
    table = read_table(write(tmp_path, name), DataOptions())
    assert (table.texts, table.names) == (TEXTS, ("hat", "none", "pet"))
    assert [table.names[label] for label in table.labels] == CLASSES
    assert (table.rows, table.skipped) == ([1, 2, 3, 4, 5], 0)


def test_lines_of_text_and_empty_ones_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n\n  \na dog\n")
    table = read_table(str(tmp_path / "a.txt"), LM)
    assert (table.texts, table.rows, table.skipped, table.labels) == (["the cat", "a dog"], [1, 4], 2, [])


@pytest.mark.parametrize(
    ("label", "names", "wanted"),
    [
        ("2>0", ("2<=0", "2>0"), [1, 0, 0, 1]),
        ("2 <= -1.5", ("2>-1.5", "2<=-1.5"), [0, 1, 0, 0]),
        ("2!=0", ("2==0", "2!=0"), [1, 1, 0, 1]),
        ("1", ("8", "9", "10"), [1, 2, 2, 0]),
    ],
)
def test_columns_by_number_and_comparisons(tmp_path, label, names, wanted):
    """Without a line of names; quotes of a .tsv are text; whole numbers sort as numbers."""
    (tmp_path / "a.tsv").write_text('9\t0.5\t"a cat\n10\t-1.5\ta dog\n10\t0\ta mat\n8\t1e-3\ta hat\n')
    table = read_table(str(tmp_path / "a.tsv"), DataOptions(text="3", label=label))
    assert (table.texts[0], table.names, table.labels) == ('"a cat', names, wanted)


def test_declared_classes_keep_their_order(tmp_path):
    kinds = datasets.ClassLabel(names=["worse", "better", "absent"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kinds})
    found = {"text": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(found, features=features).to_parquet(tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"), DataOptions())
    assert (table.names, table.labels) == (("worse", "better", "absent"), [1, 0])
    datasets.Dataset.from_dict(found | {"label": [1, -1]}, features=features).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(CheckpointError, match="Row 2 .* has none under 'label'"):
        read_table(str(tmp_path / "b.parquet"), DataOptions())


def test_a_template_puts_columns_together_and_looks_nothing_else_up(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one", "a.b": "two"}\n{"q": "", "a.b": "x"}\n{"q": "3", "a.b": null}\n')
    table = read_table(str(tmp_path / "a.jsonl"), replace(LM, text=r"{{Q}} {q}\n{a.b}!"))
    assert (table.texts, table.skipped) == (["{Q} one\ntwo!"], 2)
    for text, said in {
        "{q.__class__}": "no column 'q.__class__', it has q, a.b",
        "{q[0]}": r"no column 'q\[0\]'",
        "{q!r}": "names of columns alone",
        "{q:>9}": "names of columns alone",
        "{}": "names of columns alone",
        "{{q}}": "names of columns alone",
        "{q": "expected a column, or a template",
    }.items():
        with pytest.raises((OptionError, CheckpointError), match=said):
            read_table(str(tmp_path / "a.jsonl"), replace(LM, text=text))


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("a.csv", b"", {}, "it is empty"),
        ("a.csv", b"text,label\n", {}, "it has no rows"),
        ("a.jsonl", b"[]", {}, "it has no rows"),
        ("a.csv", b"text,label\nx,a\ny,a\n", {}, "one class only, 'a'"),
        ("a.csv", b"text,label\nx,1\ny,2\n", {"label": "label>5"}, "one class only, 'label<=5'"),
        ("a.csv", b"text,kind\nx,a\ny,b\n", {}, "no column 'label', it has text, kind"),
        ("a.csv", b"body,label\nx,a\ny,b\n", {}, "no column 'text', it has body, label"),
        ("a.csv", b"text,label\n ,a\n,b\n", {}, "no text in it"),
        ("a.csv", b"text,label\nx,a\ny,\n", {}, "Row 2 .* none under 'label'"),
        ("a.csv", b"text,label\nx,a\ny,b,c\n", {}, "Line 3 .* 3 columns, and the first has 2"),
        ("a.csv", b"text,label\nx,a,c\ny,b,c\n", {}, "Line 2 .* 3 columns, and the first has 2"),
        ("a.csv", b"text,label\nx,a\ny\n", {}, "Line 3 .* 1 columns"),
        ("a.csv", b'text,label\nx,a\n"y,b\nz,c', {}, "Line 4"),
        ("a.csv", b"text,label\nx\xff,a\n", {}, "Line 2 .* not UTF-8"),
        ("a.csv", b"x,1.5\ny,2\n", {"text": "1", "label": "2"}, "fractions under '2'.*--label '2>0'"),
        ("a.csv", b"x,1.5\ny,q\n", {"text": "1", "label": "2>0"}, "Row 2 .* 'q' under '2', expected a number"),
        ("a.csv", b"x,1.5\n", {"label": "2>0"}, "names and numbers"),
        ("a.csv", b"x,1.5\n", {"text": "1", "label": "2>1.2.3"}, "'1.2.3' is not a number"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text', {}, "JSON parse error"),
        ("a.jsonl", b'{"text": ["a"], "label": 1}', {}, "Row 1 .* has list under 'text'"),
        ("a.jsonl", b'{"text": "a", "label": [1]}', {}, "Row 1 .* has list under 'label'"),
        ("a.parquet", b"PAR1 no", {}, "[Pp]arquet"),
        ("a.xls", b"x", {}, "expected a file that ends in .csv"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_by_name(tmp_path, name, data, options, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises((CheckpointError, OptionError), match=said) as caught:
        read_table(str(tmp_path / name), DataOptions(**options))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or "--label" in str(caught.value)


def test_hub_ids_name_config_and_split_and_fail_in_one_sentence_offline(tmp_path, monkeypatch):
    asked = []
    found = datasets.Dataset.from_dict({"text": TEXTS, "label": CLASSES})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # whatever is set where the tests run
    monkeypatch.setattr(data_rows.hub, "ask", lambda question: asked.append("hub"))
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *ref, split: asked.append((*ref, split)) or found)
        for ref in ("owner/name", "owner/name:test", "owner/name:main/test"):
            assert read_table(ref, DataOptions()).texts == TEXTS
    wanted = [("owner/name", None, "train"), ("owner/name", None, "test"), ("owner/name", "main", "test")]
    assert (asked[::2], asked[1::2]) == (["hub"] * 3, wanted)

    def fail(question):
        raise OSError("no route")

    monkeypatch.setattr(data_rows.hub, "ask", fail)
    with pytest.raises(CheckpointError, match="'owner/name': no such file here.*cannot be reached .no route"):
        read_table("owner/name", DataOptions())
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        read_table("owner/name", DataOptions())
    assert datasets.config.HF_HUB_OFFLINE
    for ref in ("nothing.csv", "data/nothing.csv", "nothing"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            read_table(ref, DataOptions())


def test_other_data_keep_the_classes_of_the_first(tmp_path):
    path = write(tmp_path, "a.csv")
    (tmp_path / "b.csv").write_text("text,label\nx,pet\ny,pet\n")
    names = read_table(path, DataOptions()).names
    assert read_table(str(tmp_path / "b.csv"), DataOptions(), names=names).labels == [2, 2]
    with pytest.raises(CheckpointError, match="Row 2 .* class 'none', which the training data lacks: it has hat, pet"):
        read_table(path, DataOptions(), names=("hat", "pet"))


def test_a_limit_draws_from_the_whole_file(tmp_path):
    """Files sorted by class are common; classes are those of the whole file."""
    body = "".join(f"text {number},{number // 50}\n" for number in range(200))
    (tmp_path / "a.csv").write_text("text,label\n" + body)
    first = read_table(str(tmp_path / "a.csv"), DataOptions(limit=40))
    assert len(first.texts) == 40
    assert set(first.labels) == {0, 1, 2, 3}
    assert first.rows == sorted(first.rows)
    assert first == read_table(str(tmp_path / "a.csv"), DataOptions(limit=40))
    assert first.rows != read_table(str(tmp_path / "a.csv"), DataOptions(limit=40, seed=1)).rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.floats(0.01, 0.9), st.integers(0, 5))
def test_a_held_out_share_of_each_class(labels, share, seed):
    table = Table("file", [str(n) for n in range(len(labels))], list(range(len(labels))), labels, tuple("abcd"))
    counts = Counter(labels)
    if max(counts.values()) == 1:
        with pytest.raises(CheckpointError, match="too few texts"):
            split_table(table, share, seed=seed)
        return
    train, held = split_table(table, share, seed=seed)
    assert sorted(train.rows + held.rows) == table.rows
    for part in (train, held):
        assert part.rows == sorted(part.rows)
        assert part.labels == [labels[row] for row in part.rows]
    for kind, count in counts.items():
        found = held.labels.count(kind)
        assert found == min(count - 1, max(1, round(share * count)))
    assert split_table(table, share, seed=seed) == (train, held)


def test_the_held_out_part_depends_on_the_seed():
    table = Table("file", [str(n) for n in range(100)], list(range(100)), [])
    chosen = {tuple(split_table(table, 0.2, seed=seed)[1].rows) for seed in range(5)}
    assert len(chosen) == 5
    assert split_table(table, 0.0, seed=0)[1].rows == []


def test_equal_texts_are_held_out_together():
    """40 texts four times each, in two classes, unlike in case and spaces: none is on both sides."""
    texts = [form.format(n) for form in ("Text {}", "text {}", " TEXT  {} ", "text {}") for n in range(40)]
    table = Table("file", texts, list(range(160)), [n % 40 % 2 for n in range(160)], ("a", "b"))
    train, held = split_table(table, 0.25, seed=3)
    known, asked = ({text.split()[1] for text in part.texts} for part in (train, held))
    assert not known & asked and len(asked) == 10 and len(held.texts) == 40
    assert Counter(held.labels) == {0: 20, 1: 20}
    with pytest.raises(CheckpointError, match="too few texts .1 different ones"):
        split_table(table.take([0, 40, 80, 120]), 0.25, seed=0)


def test_ids_are_those_of_the_tokenizer(tmp_path):
    words = tokenizer(tmp_path / "t")
    examples = read_examples(write(tmp_path, "a.csv"), DataOptions(), words, limits=(64, 25))
    wanted = [words(text)["input_ids"] for text in TEXTS]
    assert [ids.tolist() for ids in examples.ids.split(examples.lengths.tolist())] == wanted
    assert (examples.labels.tolist(), examples.names) == ([2, 1, 0, 1, 2], ("hat", "none", "pet"))
    assert (examples.ids.dtype, len(examples), examples.cut) == (torch.int32, 5, 0)


def test_long_texts_are_cut_only_when_told_and_never_beyond_the_model(tmp_path):
    words, path = tokenizer(tmp_path / "t"), write(tmp_path, "a.csv")
    with pytest.raises(OptionError, match="Row 1 .* has 5 tokens, and an example takes 4: pass --cut"):
        read_examples(path, DataOptions(), words, limits=(4, 25))
    examples = read_examples(path, DataOptions(cut=True), words, limits=(4, 25))
    wanted = [words(text, truncation=True, max_length=4)["input_ids"] for text in TEXTS]
    assert [ids.tolist() for ids in examples.ids.split(examples.lengths.tolist())] == wanted
    assert examples.cut == sum(len(words(text)["input_ids"]) > 4 for text in TEXTS)
    with pytest.raises(OptionError, match="--length is 65, and the model takes 64"):
        read_examples(path, DataOptions(length=65), words, limits=(64, 25))
    with pytest.raises(CheckpointError, match="gives id 24 .* vocabulary has 24"):
        read_examples(path.replace("a.csv", "b.txt"), LM, text_with_house(tmp_path, words), limits=(64, 24))


def text_with_house(folder, words):
    (folder / "b.txt").write_text("the house\n")
    return words


@pytest.mark.parametrize("length", [2, 5, 8])
def test_packing_is_that_of_calibration(tmp_path, length):
    """Another implementation, which holds token lists: same pieces, but one of a single token predicts nothing."""
    words, path = tokenizer(tmp_path / "t", causal=True), write_text(tmp_path / "a.txt", lines=13)
    examples = read_examples(str(path), replace(LM, length=length), words)
    options = TextOptions(length=length, tokens=10**6)
    batches = make_batches(Text(path, options), words, Intake(packed=True))
    wanted = Counter(tuple(row) for batch in batches for row in batch.ids.tolist())
    found = Counter(tuple(ids.tolist()) for ids in examples.ids.split(examples.lengths.tolist()))
    assert found == Counter({row: count for row, count in wanted.items() if len(row) > 1})
    assert examples.skipped == 1
    assert padding(words) == words.eos_token_id


@pytest.mark.parametrize(("tokens", "sizes"), [(9, [4, 4]), (10, [4, 4, 2]), (8, [4, 4]), (5, [4]), (3, [3])])
def test_the_rest_of_a_packed_text_is_kept_unless_it_is_one_token(tokens, sizes):
    """One token alone has none to predict; two have one."""

    class Words(SimpleNamespace):
        __call__ = staticmethod(lambda texts, **_: {"input_ids": [list(range(10, 10 + tokens)) for _ in texts]})

    words = Words(model_max_length=10**30, eos_token_id=None)
    examples = encode(Table("file", ["text"], [1], []), replace(LM, length=4), words)
    assert examples.lengths.tolist() == sizes
    assert examples.ids.tolist() == list(range(10, 10 + sum(sizes)))


def test_texts_are_parted_before_they_are_packed(tmp_path):
    words, path = tokenizer(tmp_path / "t", causal=True), write_text(tmp_path / "a.txt", lines=20)
    options = replace(LM, holdout=0.3)
    train, held = read_split(str(path), options, words)
    tables = split_table(read_table(str(path), options), 0.3, seed=0)
    for part, table in zip((train, held), tables, strict=True):
        together = [token for text in table.texts for token in [*words(text)["input_ids"], words.eos_token_id]]
        whole = len(together) - (len(together) % 8 == 1)
        assert part.ids.tolist() == together[:whole]


def test_texts_without_tokens_are_skipped():
    def empty(texts, **_):
        return {"input_ids": [[7] * len(text.split("x")[0]) for text in texts]}

    class Words(SimpleNamespace):
        __call__ = staticmethod(empty)

    table = Table("file", ["ab", "x", "c"], [1, 2, 3], [1, 0, 0], ("n", "y"), 2)
    examples = encode(table, DataOptions(), Words(model_max_length=10**30))
    assert (examples.lengths.tolist(), examples.labels.tolist(), examples.skipped) == ([2, 1], [1, 0], 3)
    with pytest.raises(CheckpointError, match="no text in it"):
        encode(table.take([1]), DataOptions(), Words(model_max_length=10**30))


def make_examples(count, *, task="classification"):
    sizes = torch.arange(count) % 5 + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    labels = torch.arange(count) if task == "classification" else torch.empty(0, dtype=torch.int64)
    return Examples(task, torch.arange(int(sizes.sum()), dtype=torch.int32) + 10, offsets, labels)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
def test_batches_of_any_step_and_process(count, size, world, seed):
    """Asked backwards: every epoch has each example once, in an order of seed and epoch; processes share a batch."""
    examples = make_examples(count)
    parts = [Batches(examples, size=size, seed=seed, pad=0, share=Share(rank, world)) for rank in range(world)]
    steps = len(parts[0])
    for epoch in (1, 0):
        seen = []
        for place in reversed(range(steps)):
            found = [part.batch_at(epoch * steps + place)["labels"].tolist() for part in parts]
            assert len({len(rows) for rows in found}) == 1
            assert 1 <= len(found[0]) <= size
            assert place == steps - 1 or len(found[0]) == size
            seen += [row for rows in found for row in rows]
        assert len(seen) == len(set(seen)) == count // world * world
    alone = Batches(examples, size=size * world, seed=seed, pad=0)
    whole = {*alone.batch_at(0)["labels"].tolist()}
    together = {row for part in parts for row in part.batch_at(0)["labels"].tolist()}
    assert together <= whole and (len(whole) < size * world or together == whole)


def test_orders_differ_by_seed_and_by_epoch():
    examples = make_examples(30)
    orders = {tuple(Batches(examples, size=4, seed=s, pad=0).order(e).tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_rows_are_padded_on_the_right(task):
    examples = make_examples(12, task=task)
    rows = torch.tensor([8, 0, 2, 11])
    batch = examples.batch(rows, pad=3)
    width = int(examples.lengths[rows].max())
    for place, row in enumerate(rows.tolist()):
        ids = examples.ids[examples.offsets[row] : examples.offsets[row + 1]].tolist()
        rest = width - len(ids)
        assert batch["input_ids"][place].tolist() == ids + [3] * rest
        assert batch["attention_mask"][place].tolist() == [1] * len(ids) + [0] * rest
        if task == "causal-lm":
            assert batch["labels"][place].tolist() == ids + [-100] * rest
    if task == "classification":
        assert batch["labels"].tolist() == rows.tolist()


def test_more_processes_than_examples():
    with pytest.raises(OptionError, match="2 examples for 3 processes"):
        Batches(make_examples(2), size=1, seed=0, pad=0, share=Share(0, 3))


def test_the_movie_snippets():
    path = SHARED / "vader_movie_snippets.tsv"
    if not path.exists():
        pytest.skip("shared/data with the movie snippets is not beside this repository")
    table = read_table(str(path), DataOptions(text="3", label="2>0"))
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert table.texts == [text for _, _, text in lines]
    assert table.labels == [int(float(rating) > 0) for _, rating, _ in lines]
