"""Fingerprints: any change of the data is found and named, a move or a copy is none, and little is read."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from openelm.data import fingerprint as module
from openelm.data import remote, sources
from openelm.data.fingerprint import compare, fingerprint
from openelm.data.sources import Source, Unit, find_units
from openelm.errors import UserError

NOISE = random.Random(1).randbytes(3 << 20)


def units(path: Path | str) -> dict[str, list[Unit]]:
    return {"web": find_units(Source("web", str(path)))}


def saved(path: Path | str) -> dict:
    """As it comes out of a checkpoint."""
    return json.loads(json.dumps(fingerprint(units(path))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("a.txt", "b.txt", "deep/c.txt", "deep/d.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}))
    parquet.write_table(pyarrow.table({"text": ["x", "y", "z"]}), root / "e.parquet", row_group_size=1)
    (root / "big.txt").write_bytes(NOISE)
    return root


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    read: list[str] = []
    digest = module._digest

    def noting(path: str, size: int) -> str:
        read.append(Path(path).name)
        return digest(path, size)

    monkeypatch.setattr(module, "_digest", noting)
    return read


def overwrite(file: Path, at: int, content: bytes) -> None:
    """Write in the middle of a file; its time is another then, however coarse the clock."""
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))


def test_unchanged_data_pass_and_are_not_read_again(folder: Path, digested: list[str]) -> None:
    then = saved(folder)
    assert sorted(digested) == ["a.txt", "b.txt", "big.txt", "c.txt", "d.jsonl", "e.parquet"]
    entry = then["sources"]["web"]["files"]["e.parquet"]
    assert entry["size"] == (folder / "e.parquet").stat().st_size and entry["parts"] == 3
    digested.clear()
    assert compare(then, units(folder)) == then
    assert digested == []


@pytest.mark.parametrize("at", [0, (len(NOISE) - module.CHUNK_BYTES) * 5 // 15, len(NOISE) - 1])
def test_another_content_of_the_same_size_is_found(at: int, folder: Path) -> None:
    """The places that are looked at in a large file are spread over it, both ends included."""
    then = saved(folder)
    overwrite(folder / "big.txt", at, bytes([NOISE[at] ^ 1]))
    with pytest.raises(UserError, match=r"source web: .*/data/big\.txt has the same size and another content"):
        compare(then, units(folder))


def test_changed_missing_and_added_files_are_named(folder: Path) -> None:
    then = saved(folder)
    (folder / "b.txt").write_text("17 letters, too..")
    with pytest.raises(UserError, match=r"source web: .*/data/b\.txt has the same size and another content"):
        compare(then, units(folder))
    (folder / "b.txt").write_text("short")
    with pytest.raises(UserError, match=r"/data/b\.txt had 17 bytes and has 5: .*restore.*begin a new run"):
        compare(then, units(folder))
    (folder / "deep/c.txt").unlink()
    (folder / "new.txt").write_text("n")
    with pytest.raises(UserError, match=r"/data/b\.txt had 17 bytes and has 5 \(files that differ: 3\)"):
        compare(then, units(folder))
    (folder / "b.txt").write_text(json.dumps({"text": "b.txt"}))
    with pytest.raises(UserError, match=r"/data/deep/c\.txt is not there any more \(files that differ: 2\)"):
        compare(then, units(folder))
    (folder / "deep/c.txt").write_text(json.dumps({"text": "deep/c.txt"}))
    with pytest.raises(UserError, match=r"/data/new\.txt was not there when the run began: "):
        compare(then, units(folder))
    (folder / "new.txt").unlink()
    compare(then, units(folder))


def test_a_copy_elsewhere_with_other_times_is_the_same_data(folder: Path, tmp_path: Path, digested: list[str]) -> None:
    then = saved(folder)
    shutil.copytree(folder, tmp_path / "other" / "place", copy_function=shutil.copyfile)
    digested.clear()
    now = compare(then, units(tmp_path / "other" / "place"))
    assert len(digested) == 6
    # The new times are kept: the next resume reads nothing.
    digested.clear()
    compare(now, units(tmp_path / "other" / "place"))
    assert digested == []
    overwrite(tmp_path / "other/place/a.txt", 3, b"X")
    with pytest.raises(UserError, match=r"other/place/a\.txt has the same size"):
        compare(then, units(tmp_path / "other" / "place"))


def test_a_move_into_a_folder_below_or_above_is_a_move(folder: Path, tmp_path: Path) -> None:
    then = saved(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    shutil.move(tmp_path / "elsewhere", folder / "inner")
    compare(then, units(folder))
    compare(saved(folder), units(folder / "inner"))


def test_a_file_that_widens_the_shared_folder_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/a.txt").write_text("a")
    then = saved(tmp_path)
    (tmp_path / "z.txt").write_text("z")
    with pytest.raises(UserError, match=rf"source web: {tmp_path}/z\.txt was not there when the run began: "):
        compare(then, units(tmp_path))
    both = saved(tmp_path)
    (tmp_path / "z.txt").unlink()
    with pytest.raises(UserError, match=rf"source web: {tmp_path}/z\.txt is not there any more: "):
        compare(both, units(tmp_path))


def test_relative_paths_are_known_from_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    then = saved("data")
    monkeypatch.chdir("/")
    assert compare(then, units(folder)) == then


def test_other_sources_and_other_parts_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = saved(folder)
    with pytest.raises(UserError, match=r"began with the sources web; the recipe has books"):
        compare(then, {"books": units(folder)["web"]})
    with pytest.raises(UserError, match=r"format 0"):
        compare({"format": 0}, units(folder))
    monkeypatch.setattr(sources, "SPLIT_BYTES", 5)
    with pytest.raises(UserError, match=r"deep/d\.jsonl was read in 1 parts and now is in 5"):
        compare(then, units(folder))


def test_a_file_that_vanishes_meanwhile_is_named(folder: Path) -> None:
    found = units(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(No such file"):
        fingerprint(found)


def test_remote_files_are_known_by_what_their_server_states(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/prints/a.txt", b"abc")
    memory.pipe("/prints/b.txt", b"abcd")
    try:
        found = units("memory://prints")
        for url, unit in zip(("a", "b"), found["web"], strict=True):
            remote.versions[unit.path] |= {"ETag": f'"{url}"'}
        then = json.loads(json.dumps(fingerprint(found)))
        assert then["sources"]["web"] == {
            "place": "memory:///prints/",
            "files": {
                "a.txt": {"size": 3, "ETag": '"a"', "parts": 1},
                "b.txt": {"size": 4, "ETag": '"b"', "parts": 1},
            },
        }
        assert compare(then, found) == then
        remote.versions[found["web"][1].path]["ETag"] = '"c"'
        with pytest.raises(
            UserError, match=r'memory:///prints/b\.txt has the same size and another.*ETag "b", now "c"'
        ):
            compare(then, found)
        memory.pipe("/moved/a.txt", b"abc")
        memory.pipe("/moved/b.txt", b"abcd")
        compare(then, units("memory://moved"))  # a server marks its own copy in its own way
        memory.pipe("/moved/b.txt", b"abcde")
        with pytest.raises(UserError, match=r"memory:///moved/b\.txt had 4 bytes and has 5"):
            compare(then, units("memory://moved"))
    finally:
        for place in ("/prints", "/moved"):
            memory.rm(place, recursive=True)


def test_the_python_installation_has_a_fingerprint() -> None:
    start_s = time.perf_counter()
    found = {"python": find_units(Source("python", "python"))}
    then = json.loads(json.dumps(fingerprint(found)))
    elapsed_s = time.perf_counter() - start_s
    assert {"json/decoder.py", "pydoc_data/topics"} <= then["sources"]["python"]["files"].keys()
    assert compare(then, found) == then
    assert elapsed_s < 10  # half a second on an idle machine
    entry = then["sources"]["python"]["files"]["json/decoder.py"]
    entry["mtime_ns"] += 1
    compare(then, found)
    entry["mtime_ns"] += 1
    entry["digest"] = "0" * 32
    with pytest.raises(UserError, match=r"source python: python:json/decoder\.py has the same size and another"):
        compare(then, found)
    del then["sources"]["python"]["files"]["pydoc_data/topics"]
    then["sources"]["python"]["files"]["gone.py"] = {"size": 1, "mtime_ns": 1, "digest": "", "parts": 1}
    with pytest.raises(UserError, match=r"source python: python:gone\.py is not there any more \(files that differ: 3"):
        compare(then, found)


@pytest.mark.slow  # twenty thousand files are made first
def test_many_small_files_take_seconds(tmp_path: Path) -> None:
    for number in range(20_000):
        file = tmp_path / f"{number % 100}" / f"{number}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(NOISE[number : number + 3000])
    found = units(tmp_path)
    start_s = time.perf_counter()
    then = fingerprint(found)
    first_s = time.perf_counter() - start_s
    compare(then, found)
    second_s = time.perf_counter() - start_s - first_s
    print(f"fingerprint {first_s:.2f} s, compare {second_s:.2f} s, JSON {len(json.dumps(then)) / 1e6:.2f} MB")
    assert first_s < 30 and second_s < 10
