"""Records: every format gives the same ones, in order, and what is wrong is named by file and line."""

import gzip
import json
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from openelm.data.records import find, read, records
from openelm.errors import UserError

TURN = {"role": "user", "content": "Ünïcödé 你好 \U0001f600\n\\u0041"}
RECORDS = [{"id": n, "text": f"line {n}\u2028\r\n", "messages": [TURN] * (n % 3), "none": None} for n in range(700)]
LINES = "".join(json.dumps(record, ensure_ascii=record["id"] % 2 == 0) + "\n" for record in RECORDS).encode()
LIST = json.dumps(RECORDS, indent=1).encode()
BOM = b"\xef\xbb\xbf"
CONTENTS = {
    "a.jsonl": LINES,
    "a.ndjson": BOM + LINES.replace(b"\n", b"\r\n\n  \n").rstrip(),
    "a.json": LIST,
    "b.json": LINES,
    "c.json": BOM + b"\n " + LIST,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.gz": gzip.compress(LIST),
    "a.JSON.zst": zstandard.compress(LIST),
    "a.jsonl.zst": zstandard.compress(LINES),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_json_of_every_kind_gives_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENTS[name])
    assert list(read(str(path))) == RECORDS
    assert list(records(str(tmp_path))) == RECORDS


def test_parquet_gives_all_columns(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=300)
    assert list(read(path)) == RECORDS


def test_folders_globs_and_urls_are_read_file_after_file_in_order(tmp_path: Path) -> None:
    for name in ("train-2.jsonl", "deep/train-1.json.gz", "train-0.parquet", "README.md", "notes.txt", ".x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("parquet"):
            parquet.write_table(pyarrow.Table.from_pylist([{"name": name}]), path)
        else:
            content = json.dumps({"name": name}).encode()
            path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    wanted = ["deep/train-1.json.gz", "train-0.parquet", "train-2.jsonl"]
    assert find(str(tmp_path)) == [str(tmp_path / name) for name in wanted]
    assert [record["name"] for record in records(str(tmp_path))] == wanted
    assert [record["name"] for record in records(str(tmp_path / "train-*"))] == wanted[1:]
    memory = fsspec.filesystem("memory")
    for path in find(str(tmp_path)):
        memory.pipe("/sets/" + Path(path).name, Path(path).read_bytes())
    found = ["train-0.parquet", "deep/train-1.json.gz", "train-2.jsonl"]
    assert [record["name"] for record in records("memory://sets")] == found
    memory.rm("/sets", recursive=True)


def test_what_is_whole_comes_before_the_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES[: len(LINES) // 2] + b"{half\n" + LINES)
    assert list(islice(read(str(path)), 300)) == RECORDS[:300]
    with pytest.raises(UserError):
        list(read(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a"', r"a\.jsonl: line 3 is no JSON \(.*mend it"),
        ("a.jsonl", b"[" * 100_000, r"line 1 is no JSON \("),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is no JSON object: each record is one"),
        ("a.jsonl", b"[\n{}]\n", "line 1 is no JSON "),
        ("a.json", b'[{"a": 1}, 2]', "entry 2 of its list is no JSON object"),
        ("a.json", b'[{"a": 1}, ', r"a\.json: its JSON list is no JSON"),
        ("a.json", b'{\n"a": 1}', "line 1 is no JSON"),
        ("a.jsonl", b'{}\n{"a": "\xff"}', r"line 2 cannot be read .*UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-30], r"a\.jsonl\.gz: damaged .*fetch it again$"),
        ("a.json.zst", zstandard.compress(LIST)[:-30], "damaged"),
        ("a.json.gz", b"", r"damaged \(the file is empty\)"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: damaged"),
        ("a.txt", b"words", r"a\.txt: records are read from files ending in \.jsonl"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read(str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "on_corrupt" not in str(caught.value)  # a setting of the token stream's


def test_nothing_found_and_a_file_that_vanished_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "*.json"):
        with pytest.raises(UserError, match=r"nothing to read at .*\.parquet: check the path"):
            list(records(str(path)))
    with pytest.raises(UserError, match="cannot be opened"):
        list(read(str(tmp_path / "none.jsonl")))


def test_an_empty_file_has_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b" \n\n")
    (tmp_path / "b.json").write_bytes(b"[]")
    assert list(records(str(tmp_path))) == []
