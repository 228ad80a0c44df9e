"""Excerpts: the beginnings of many documents, all of few; never one that was asked to be left out."""

import json
from pathlib import Path

import pytest

from openelm.data import excerpts as module
from openelm.data.excerpts import excerpts
from openelm.data.stream import is_held_out


class Letters:
    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Fifty documents, each of one letter, 5 to 54 times."""
    lines = [json.dumps({"text": chr(100 + i) * (5 + i)}) + "\n" for i in range(50)]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    return str(tmp_path)


def letters(found: module.Excerpts) -> list[str]:
    return [chr(ids[1]) for ids in found.documents]


def test_few_tokens_are_the_beginnings_of_many_documents(source, monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS", 4)
    found = excerpts([source], Letters(), 100)
    assert found.tokens == 100 and len(found.digests) == 25
    assert found.num_bytes == sum(4 * len(letter.encode()) for letter in letters(found))
    assert all(ids[0] == 1 and len(ids) == 5 for ids in found.documents)
    assert letters(found) == letters(excerpts([source], Letters(), 100)) != sorted(letters(found))


def test_where_beginnings_are_too_few_all_is_read(source, monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS", 4)
    everything = excerpts([source], Letters(), 10**6)
    assert everything.tokens == sum(range(5, 55)) and len(everything.digests) == 50
    assert max(map(len, everything.documents)) == 5
    some = excerpts([source], Letters(), 400)
    assert 400 <= some.tokens < 404 and len(some.digests) < 50


def test_documents_are_left_out_by_digest_and_chosen_by_hash(source):
    some = excerpts([source], Letters(), 300)
    others = excerpts([source], Letters(), 10**6, but=some.digests)
    assert sorted(letters(some) + letters(others)) == [chr(100 + i) for i in range(50)]
    held_out = excerpts([source], Letters(), 10**6, held_out=0.2)
    assert 0 < len(held_out.documents) < 50
    assert all(is_held_out("".join(map(chr, ids[1:])), 0.2) for ids in held_out.documents)


def test_paths_take_turns(source, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "one.txt"
    other.write_text("ABC")
    assert letters(excerpts([source, str(other)], Letters(), 40))[1] == "A"


def test_rows_are_whole_and_what_has_no_text_has_none(source, tmp_path):
    found = excerpts([source], Letters(), 100)
    rows = found.rows(7)
    joined = [id for ids in found.documents for id in ids]
    assert [id for row in rows for id in row] == joined[: 7 * len(rows)] and len(joined) - 7 * len(rows) < 7
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert excerpts([str(empty)], Letters(), 10).documents == []
