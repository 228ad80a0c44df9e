"""Sources: every format gives each document once, in order; damage is named, and found after what is whole."""

import gzip
import json
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from openelm.data import sources
from openelm.data.files import open_binary
from openelm.data.sources import CorruptFile, Decoded, Source, Unit, decode_record, find_units, read_records
from openelm.errors import UserError

TEXTS = ["one", "", "two\nlines\r\n", "Ünïcödé 你好 \U0001f600", " \t", "x" * 3000, 'quo"ted \\u0041', "last"]


def json_lines(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)
    ).encode()


def many_texts(count: int) -> list[str]:
    """Texts that compress badly, so that a damaged file has a whole part before the damage."""
    draw = random.Random(5)
    return [f"{i} " + "".join(chr(draw.randrange(33, 126)) for _ in range(200)) for i in range(count)]


def read(source: Source, unit: Unit | None = None) -> list[Decoded]:
    units = find_units(source) if unit is None else [unit]
    return [decode_record(raw, unit, source) for unit in units for raw in read_records(unit, source)]


def texts_of(path: Path | str, **options: str) -> list[str | None]:
    return [decoded.text for decoded in read(Source("s", str(path), **options))]  # type: ignore[arg-type]


def records_before_damage(source: Source) -> tuple[list[bytes], CorruptFile]:
    """Reads to the damage that must be there."""
    records = []
    with pytest.raises(CorruptFile) as caught:
        for unit in find_units(source):
            for raw in read_records(unit, source):
                records.append(raw)
    return records, caught.value


def pack_zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


# Formats


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(json_lines(TEXTS))
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", pack_zst)])
def test_compressed_json_lines(ending: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    texts = TEXTS + many_texts(3000)
    (tmp_path / f"a.json.{ending}").write_bytes(pack(json_lines(texts)))
    assert texts_of(tmp_path / f"a.json.{ending}") == texts


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", pack_zst)])
def test_several_members_in_one_file_are_all_read(ending: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    texts = many_texts(400)
    content = json_lines(texts)
    cuts = [0, 1, 5000, 5001, 60_000, len(content)]  # in mid-line too
    parts = [content[a:b] for a, b in pairwise(cuts)]
    file = tmp_path / f"a.jsonl.{ending}"
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" if ending == "zst" else b""
    file.write_bytes(skippable + b"".join(pack(part) for part in parts) + skippable)
    assert find_units(Source("s", str(file)))[0].format == f"jsonl.{ending}"
    assert texts_of(file) == texts


@pytest.mark.parametrize("ending", ["gz", "zst", "jsonl", "txt"])
def test_compression_is_recognised_by_content(ending: str, tmp_path: Path) -> None:
    if ending == "txt":
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a text"))
        assert texts_of(tmp_path / "a.txt.gz") == ["a text"]
        return
    plain, packed = tmp_path / f"plain.jsonl.{ending}", tmp_path / "packed.jsonl"
    plain.write_bytes(json_lines(TEXTS))
    packed.write_bytes(pack_zst(json_lines(TEXTS)) if ending == "zst" else gzip.compress(json_lines(TEXTS)))
    assert texts_of(packed) == TEXTS
    assert texts_of(plain) == TEXTS


def test_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    content = b'\n{"text": "a"}\r\n  \n{"text": "b"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert texts_of(tmp_path / "a.jsonl") == ["a", "b"]
    assert texts_of(tmp_path / "a.jsonl.gz") == ["a", "b"]


def test_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes("\ufefftitle\r\n\n\tbody\n".encode())
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert texts_of(tmp_path / "a.md") == ["title\r\n\n\tbody\n"]
    assert texts_of(tmp_path / "LICENSE") == ["free"]
    assert texts_of(tmp_path / "empty.txt") == [""]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), "dictionary"])
def test_parquet_has_a_unit_for_each_row_group(kind: object, tmp_path: Path) -> None:
    texts = [*TEXTS, None, *many_texts(1000)]
    column = pyarrow.array(texts, pyarrow.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"id": range(len(texts)), "body": column})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    source = Source("s", str(tmp_path / "a.parquet"), text_key="body")
    units = find_units(source)
    assert [(unit.format, unit.part) for unit in units] == [("parquet", part) for part in range(4)]
    assert all(unit.size_bytes > 1000 for unit in units)
    assert [decoded.text for decoded in read(source)] == texts
    assert [decoded.text for decoded in read(source, units[2])] == texts[600:900]
    assert read(source)[len(TEXTS)] == Decoded(None, "undecodable")


def test_python_source_is_library_and_help_topics_without_tests() -> None:
    source = Source("python", "python")
    units = find_units(source)
    paths = {unit.path for unit in units}
    assert {"python:json/decoder.py", "python:ast.py", "python:pydoc_data/topics"} <= paths
    assert not any("/test" in path or "packages" in path or "__pycache__" in path for path in paths)
    assert units == sorted(units, key=lambda unit: unit.path)
    by_path = {unit.path: unit for unit in units}
    decoder = read(source, by_path["python:json/decoder.py"])
    assert len(decoder) == 1 and decoder[0].text == Path(json.decoder.__file__).read_text("utf-8")
    topics = read(source, by_path["python:pydoc_data/topics"])
    assert len(topics) > 50
    assert any(decoded.text is not None and 'The "assert" statement' in decoded.text for decoded in topics)
    assert by_path["python:pydoc_data/topics"].size_bytes == sum(len((d.text or "").encode()) for d in topics)


# Finding


def test_folder_is_walked_in_a_fixed_order_for_known_endings(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl", "a.py", "c.PARQUET", "c.png", ".hidden/x.txt", ".y.txt", "z.json.gz", "d.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(json_lines(["x"]))
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "c.PARQUET")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = [str(Path(unit.path).relative_to(tmp_path)) for unit in find_units(Source("s", str(tmp_path)))]
    assert found == ["a.py", "b/1.jsonl", "b/2.txt", "c.PARQUET", "z.json.gz"]


def test_glob_and_names_with_glob_characters(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt", "x[1].txt"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path / "a*.txt") == ["a1.txt", "a2.txt"]
    assert texts_of(tmp_path / "x[1].txt") == ["x[1].txt"]


def test_nothing_found_names_path_and_endings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source web: nothing to read at '.*absent'.*\.txt.*\.jsonl.*\.parquet"):
        find_units(Source("web", str(tmp_path / "absent")))


def test_json_over_many_lines_is_refused(tmp_path: Path) -> None:
    for content in ("[\n {}\n]", '{\n "text": "a"\n}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json: one JSON value over many lines.*jq"):
            find_units(Source("s", str(tmp_path)))


def test_urls_are_read_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/b.jsonl", json_lines(TEXTS))
    memory.pipe("/corpus/deep/a.jsonl.gz", gzip.compress(json_lines(["packed"])))
    memory.pipe("/corpus/c.png", b"no")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["columns"]}), sink)
    memory.pipe("/corpus/z.parquet", sink.getvalue().to_pybytes())
    try:
        assert texts_of("memory://corpus") == [*TEXTS, "packed", "columns"]
        assert texts_of("memory://corpus/*.jsonl") == TEXTS
        assert texts_of("memory://corpus/b.jsonl") == TEXTS
        with pytest.raises(UserError, match="nothing to read"):
            find_units(Source("s", "memory://corpus/absent"))
    finally:
        memory.rm("/corpus", recursive=True)


def test_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(UserError, match=r"s3://bucket/a\.txt.*s3fs.*openelm-framework\[remote\]"):
        find_units(Source("s", "s3://bucket/a.txt"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="nosuch"):
        find_units(Source("s", "nosuch://bucket/a.txt"))


def test_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: cannot be opened \(No such file"):
        open_binary(str(tmp_path / "gone.txt"))


# Byte ranges


@pytest.mark.parametrize("split_bytes", [1, 7, 64, 100, 1000, 3000])
def test_ranges_of_a_long_file_give_each_document_once(
    split_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SPLIT_BYTES", split_bytes)
    content = json_lines(TEXTS) + b'\n\n{"text": "after blank lines"}\n{"text": "no newline"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    source = Source("s", str(tmp_path / "a.jsonl"))
    units = find_units(source)
    assert sum(unit.size_bytes for unit in units) == len(content)
    assert len(units) == -(-len(content) // split_bytes)
    assert [decoded.text for decoded in read(source)] == [*TEXTS, "after blank lines", "no newline"]
    for unit in units:
        for raw in read_records(unit, source):
            assert unit.end is not None and unit.start <= content.index(raw) < unit.end


def test_compressed_files_are_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPLIT_BYTES", 10)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(json_lines(TEXTS)))
    assert len(find_units(Source("s", str(tmp_path / "a.jsonl")))) == 1


# Damage


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", pack_zst)])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "flipped at the end"])
def test_damaged_file_is_named_after_its_whole_records(
    ending: str, pack: Callable[[bytes], bytes], damage: str, tmp_path: Path
) -> None:
    content = json_lines(many_texts(5000))
    packed = bytearray(pack(content))
    if damage == "cut":
        del packed[-len(packed) // 4 :]
    elif damage == "overwritten":
        packed[len(packed) * 3 // 4 :] = b"\xff" * (len(packed) - len(packed) * 3 // 4)
    else:
        packed[-1 if ending == "zst" else -5] ^= 1  # the checksum
    file = tmp_path / f"a.jsonl.{ending}"
    file.write_bytes(packed)
    records, error = records_before_damage(Source("s", str(file)))
    lines = content.splitlines()
    assert len(records) > 2500
    assert records == lines[: len(records)]
    assert str(file) in str(error) and "on_corrupt: skip" in str(error)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("content", [b"", b"\x00garbage"])
def test_what_only_has_the_name_of_a_packed_file_is_corrupt(ending: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / f"a.jsonl.{ending}"
    file.write_bytes(content)
    records, error = records_before_damage(Source("s", str(file)))
    assert records == [] and error.path == str(file)


def test_damaged_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": many_texts(1000)})
    parquet.write_table(table, file, row_group_size=500, write_page_checksum=True)
    whole = file.read_bytes()
    second_group = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    file.write_bytes(whole[: second_group + 200] + b"\0" * 64 + whole[second_group + 264 :])
    records, error = records_before_damage(Source("s", str(file)))
    assert [record.decode() for record in records] == many_texts(500)
    assert "a.parquet: damaged" in str(error)
    for content in (whole[:-100], b"PAR1", b"", whole[:100]):
        file.write_bytes(content)
        assert records_before_damage(Source("s", str(file)))[0] == []


def test_corrupt_file_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(CorruptFile("a.gz", "cut short")))
    assert (error.path, error.reason, type(error)) == ("a.gz", "cut short", CorruptFile)
    assert str(error).startswith("a.gz: damaged (cut short)")


# Decoding


def decoded(raw: bytes, form: str = "jsonl", **options: str) -> Decoded:
    return decode_record(raw, Unit("dir/a.jsonl", form), Source("s", "dir", **options))  # type: ignore[arg-type]


def test_invalid_utf8_is_repaired_or_skipped() -> None:
    assert decoded(b'{"text": "a\xffb"}') == ("a\ufffdb", "invalid_utf8")
    assert decoded(b'{"text": "a\xffb"}', on_invalid_utf8="skip") == (None, "invalid_utf8")
    assert decoded(b"a\xe4\xbdb", "text") == ("a\ufffdb", "invalid_utf8")
    assert decoded(b"a\xe4\xbdb", "parquet", on_invalid_utf8="skip") == (None, "invalid_utf8")
    assert decoded(b"plain", "text") == ("plain", None)


def test_half_a_surrogate_pair_is_invalid_utf8() -> None:
    assert decoded(rb'{"text": "a\uD83Db"}') == ("a\ufffdb", "invalid_utf8")
    assert decoded(rb'{"text": "a\ud83db"}', on_invalid_utf8="skip") == (None, "invalid_utf8")
    assert decoded(rb'{"text": "a\ud83d\ude00"}') == ("a\U0001f600", None)
    assert decoded(rb'{"text": "fine", "other": "\ud83d"}') == ("fine", None)


@pytest.mark.parametrize(
    "raw", [b"not json", b'{"text": "cut', b"[1]", b'"text"', b"3", b"[" * 100_000, b'{"text": null}']
)
def test_what_is_no_object_with_text_is_undecodable(raw: bytes) -> None:
    assert decoded(raw) == (None, "undecodable")


def test_missing_key_names_the_keys_there_are() -> None:
    with pytest.raises(UserError, match=r"dir/a\.jsonl: no key 'text'.*'id', 'content'.*text_key of source s"):
        decoded(b'{"id": 1, "content": "x"}')
    with pytest.raises(UserError, match=r"'text' is a list"):
        decoded(b'{"text": ["a"]}')
    assert decoded(b'{"id": 1, "content": "x"}', text_key="content") == ("x", None)


def test_missing_parquet_column_names_the_columns_there_are(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [1], "content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'.*'id', 'content'"):
        find_units(Source("s", str(tmp_path)))
    with pytest.raises(UserError, match="'id' holds int64"):
        find_units(Source("s", str(tmp_path), text_key="id"))


def test_a_reader_that_stops_early_leaves_the_rest_unread(tmp_path: Path) -> None:
    """Skipping foreign documents must not need the whole file: the last lines here are damaged."""
    packed = gzip.compress(json_lines(many_texts(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    source = Source("s", str(tmp_path / "a.jsonl.gz"))
    records = read_records(find_units(source)[0], source)
    assert [next(records) for _ in range(3)] == json_lines(many_texts(3)).splitlines()
