"""Both ways of reading a file of texts, row by row and whole, agree on what stands in it."""

from __future__ import annotations

import json

import pytest

from deltaspec.io.data_rows import read_rows
from deltaspec.io.text_rows import read_texts

TEXTS = ["the cat sat", "NA", 'a "red" hat', "old, new", "x # y"]


def lay_out(texts, kind):
    """Write texts as one column among two, after a byte order mark."""
    if kind == "jsonl":
        return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts))
    if kind == "tsv":
        return "n\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts))
    quoted = (text.replace('"', '""') for text in texts)
    return "n,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(quoted))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_column_is_the_same_row_by_row_and_whole(kind, tmp_path):
    path = tmp_path / f"texts.{kind}"
    path.write_text(("" if kind == "jsonl" else "\ufeff") + lay_out(TEXTS, kind), encoding="utf-8")
    assert [text for _, text in read_texts(path, field="text")] == TEXTS
    assert list(read_rows(str(path), ["text"])["text"]) == TEXTS


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_column_by_number_has_no_line_of_names_in_either(kind, tmp_path):
    path = tmp_path / f"texts.{kind}"
    path.write_text(lay_out(TEXTS, kind).partition("\n")[2], encoding="utf-8")
    assert [text for _, text in read_texts(path, field="2")] == TEXTS
    assert list(read_rows(str(path), ["2"])["2"]) == TEXTS


def test_no_more_is_read_than_is_taken(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\nnot JSON\n', encoding="utf-8")
    texts = read_texts(path, field="text")
    assert [next(texts), next(texts)] == [(1, "one"), (3, "two")]
