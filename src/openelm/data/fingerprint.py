"""What a run's data were when it began: a resumed run must read the same files, or its rows are others.

Of a local file its size, time and a digest are kept; of one behind a URL what its server states, so that nothing is
read. The files of a source are known by their place below the folder that all of them share: data may be moved.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from openelm.data.files import PYTHON, is_url, library_file, together
from openelm.data.remote import version
from openelm.data.sources import Source, Unit, read_records
from openelm.errors import UserError

FORMAT = 1
WHOLE_BYTES = 1 << 20  # a longer file is looked at in as many places as this holds chunks
CHUNK_BYTES = 64 << 10
_CHUNKS = WHOLE_BYTES // CHUNK_BYTES
_THREADS = 8  # digests of small files wait for the disk, and that of a network for longer
# A server's own marks: another one, or the same after a move, has others for the same content.
_MARKS = {"ETag", "Last-Modified"}

Entry = dict[str, Any]  # of one file: size, parts, and mtime_ns and digest, or what a server states


def fingerprint(units: dict[str, list[Unit]]) -> dict[str, Any]:
    """What identifies the data of each source, by name: plain JSON. UserError: a file cannot be read."""
    return {"format": FORMAT, "sources": {name: _of_source(found, None) for name, found in units.items()}}


def compare(saved: dict[str, Any], units: dict[str, list[Unit]]) -> dict[str, Any]:
    """The fingerprint of today's data, if they are those of ``saved``. UserError names the first file that is not.

    A local file with the size and time that it had is taken to be the same; only others are read.
    """
    if saved.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint's data fingerprint has format {saved.get('format')!r}, this version reads {FORMAT}: "
            "resume with the version that wrote it, or begin a new run"
        )
    then = saved["sources"]
    if then.keys() != units.keys():
        raise UserError(
            f"the run began with the sources {', '.join(then)}; the recipe has {', '.join(units)}: "
            "restore the recipe's sources, or begin a new run"
        )
    now = {}
    for name, found in units.items():
        now[name] = _of_source(found, then[name])
        _compare_source(name, then[name], now[name])
    return {"format": FORMAT, "sources": now}


def _of_source(units: list[Unit], saved: dict[str, Any] | None) -> dict[str, Any]:
    """``{"place": folder, "files": {path below it: entry}}``; digests that still hold are those of ``saved``."""
    parts = Counter(unit.path for unit in units)
    first = {unit.path: unit for unit in reversed(units)}
    place, names = _names(sorted(parts))
    known = _aligned(saved, place, set(names.values()))[0] if saved else {}
    entries = dict(zip(names, _entries([first[path] for path in names]), strict=True))
    unread = []
    for path, entry in entries.items():
        entry["parts"] = parts[path]  # they are the units that are shuffled
        if "mtime_ns" in entry:
            old = known.get(names[path], {})
            if "digest" in old and all(old.get(key) == entry[key] for key in ("size", "mtime_ns")):
                entry["digest"] = old["digest"]
            else:
                unread.append(path)
    with ThreadPoolExecutor(_THREADS, "openelm-digest") as pool:
        digests = pool.map(lambda path: _digest(path, entries[path]["size"]), unread)
        for path, digest in zip(unread, digests, strict=True):
            entries[path]["digest"] = digest
    return {"place": place, "files": {names[path]: entry for path, entry in entries.items()}}


def _names(paths: list[str]) -> tuple[str, dict[str, str]]:
    """The folder, or its URL, that all paths share, with its "/"; and what each path is called below it."""
    if all(path.startswith(PYTHON) for path in paths):
        return PYTHON, {path: path[len(PYTHON) :] for path in paths}
    full = {path: path if is_url(path) else os.path.abspath(path).replace(os.sep, "/") for path in paths}  # noqa: PTH100
    low, high = min(full.values()), max(full.values())
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    place = low[: low.rfind("/", 0, same) + 1]
    return place, {path: name[len(place) :] for path, name in full.items()}


def _entries(units: list[Unit]) -> list[Entry]:
    """Of each file what can be known without reading it."""
    remote = [unit.path for unit in units if is_url(unit.path)]
    stated = dict(zip(remote, together(version, remote), strict=True)) if remote else {}
    return [stated[unit.path] if unit.path in stated else _local_entry(unit) for unit in units]


def _local_entry(unit: Unit) -> Entry:
    if unit.format == "python-topics":  # text that Python holds, not a file
        digest = blake2b(digest_size=16)
        for record in read_records(unit, Source("python", "python")):
            digest.update(b"%d " % len(record) + record)
        return {"size": unit.size_bytes, "digest": digest.hexdigest()}
    try:
        stat = _local(unit.path).stat()
    except OSError as error:
        raise _unreadable(unit.path, error) from error
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _local(path: str) -> Path:
    return library_file(path) if path.startswith(PYTHON) else Path(path)


def _digest(path: str, size: int) -> str:
    """Of the whole content, or of chunks spread from the first byte to the last."""
    digest = blake2b(digest_size=16)
    try:
        # Unbuffered: a chunk then is one call.
        with _local(path).open("rb", buffering=0) as file:
            if size <= WHOLE_BYTES:
                digest.update(file.readall())
            else:
                for chunk in range(_CHUNKS):
                    file.seek((size - CHUNK_BYTES) * chunk // (_CHUNKS - 1))
                    digest.update(file.read(CHUNK_BYTES))
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read ({error.strerror or error}): it was there when the source was listed; "
        "put it back, or start again"
    )


# Comparing


def _aligned(saved: dict[str, Any], place: str, names: set[str]) -> tuple[dict[str, Entry], bool]:
    """The saved entries, called as they would be below today's ``place``; and whether they lay there.

    A file more or less can change the folder that all share: then one folder lies in the other, and nothing was moved.
    """
    was, files = saved["place"], saved["files"]
    if files.keys() != names:
        if was.startswith(place):
            return {was[len(place) :] + name: entry for name, entry in files.items()}, True
        if place.startswith(was):
            below = place[len(was) :]
            return {n[len(below) :] if n.startswith(below) else was + n: entry for n, entry in files.items()}, True
    return files, was == place


def _compare_source(name: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    there = now["files"]
    then, same_place = _aligned(saved, now["place"], there.keys())
    problems = []
    for path in sorted(then.keys() | there.keys()):
        if path not in there:
            problems.append((path, "is not there any more"))
        elif path not in then:
            problems.append((path, "was not there when the run began"))
        elif what := _difference(then[path], there[path], same_place):
            problems.append((path, what))
    if not problems:
        return
    path, what = problems[0]
    full = path if path.startswith(saved["place"]) else now["place"] + path
    others = len(problems) - 1
    more = f" (files that differ: {others + 1:,})" if others else ""
    raise UserError(
        f"source {name}: {full} {what}{more}: a resumed run must read the data that it began with; "
        "restore the files as they were, or begin a new run"
    )


def _difference(then: Entry, now: Entry, same_place: bool) -> str:
    """In words what differs; "" where the content is the same as far as can be told."""
    if then.get("size") != now.get("size"):
        return f"had {then.get('size'):,} bytes and has {now.get('size'):,}"
    for key in sorted((then.keys() & now.keys()) - {"size", "parts", "mtime_ns"}):
        if then[key] != now[key] and (same_place or key not in _MARKS):
            return f"has the same size and another content ({key} {then[key]}, now {now[key]})"
    if then["parts"] != now["parts"]:
        return f"was read in {then['parts']} parts and now is in {now['parts']}"
    return ""
