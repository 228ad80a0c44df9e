"""Finding and opening files: local, behind a URL (through fsspec), or of the Python that runs us.

A path here is a string: a local path, "scheme://...", or "python:json/decoder.py" for a file of the standard
library, which means the same on every machine.
"""

from __future__ import annotations

import glob
import io
import os
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from openelm.data.backends import file_system_of, is_absent
from openelm.data.remote import HTTP, RemoteFile, tried, version_of, versions
from openelm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PYTHON = "python:"
# Tests are left out of the Python installation's text: they are bulky, odd, and absent on many machines.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
_BUFFER_BYTES = 1 << 20
_REMOTE_BUFFER_BYTES = 64 << 10  # the blocks behind it are the buffer
_LISTING_THREADS = 16


def is_url(path: str) -> bool:
    """Whether fsspec, not the local file system, opens `path`."""
    return "://" in path


def open_binary(path: str, start: int = 0, end: int | None = None) -> io.BufferedReader:
    """Open any path for reading bytes. UserError: not there, not readable, or its backend is not installed.

    Behind a URL, the bytes from ``start`` to ``end`` are fetched ahead of the reader.
    """
    if is_url(path):
        return io.BufferedReader(RemoteFile(path, start, end), _REMOTE_BUFFER_BYTES)
    try:
        if path.startswith(PYTHON):
            return io.BufferedReader(io.FileIO(library_file(path)), _BUFFER_BYTES)
        return io.BufferedReader(io.FileIO(path), _BUFFER_BYTES)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be opened ({reason}): check the path and your access to it") from error


def open_for_parts(path: str) -> io.BufferedReader | RemoteFile:
    """Open any path for reading here and there; behind a URL nothing is fetched but what is read."""
    return RemoteFile(path, random_access=True) if is_url(path) else open_binary(path)


def library_file(path: str) -> Path:
    """Where a "python:" path lies on this machine."""
    return _library_folder() / path[len(PYTHON) :]


def peek(path: str, size: int = 512) -> bytes:
    """The first bytes of a local file, to recognise its format; b"" behind a URL, where it would cost a request."""
    if is_url(path):
        return b""
    with open_binary(path) as file:
        return file.read(size)


def find_files(path: str, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    """(path, size in bytes) of the files that `path` means, sorted by path.

    A file is itself, whatever its name. A folder stands for the files under it whose name is `wanted`, hidden
    ones left out. A glob stands for its matches. Nothing there: an empty list.
    """
    found = _find_remote(path, wanted) if is_url(path) else _find_local(str(Path(path).expanduser()), wanted)
    return sorted(set(found))


def find_library() -> list[tuple[str, int]]:
    """(path, size in bytes) of the standard library's own Python files, tests left out, sorted by path."""
    root = _library_folder()
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        for name in names:
            file = Path(folder, name)
            if name.endswith(".py") and file.is_file():
                found.append((PYTHON + file.relative_to(root).as_posix(), file.stat().st_size))
    return sorted(found)


def together(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """``function`` of each item, several at a time, in the order of the items; the first error ends it."""
    pool = ThreadPoolExecutor(_LISTING_THREADS, "openelm-list")
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _find_local(path: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    # A name that exists is taken as it is, though it may hold glob characters: "part[1].txt".
    # pathlib's glob takes no absolute pattern.
    matches = [path] if Path(path).exists() else glob.glob(path, recursive=True)  # noqa: PTH207
    for match in matches:
        if Path(match).is_dir():
            yield from _walk(match, wanted)
        elif Path(match).is_file():
            yield match, Path(match).stat().st_size


def _walk(root: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """Files under a folder. Links to folders are followed, since data often lies behind them, each folder once."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and wanted(name) and file.is_file():
                yield str(file), file.stat().st_size


def _find_remote(url: str, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    """(URL, size in bytes) of the files that a URL means; 0 where the server does not tell the size."""
    file_system, inner = file_system_of(url)

    def found(attempt: int) -> list[dict[str, Any]]:
        file_system.invalidate_cache()  # else an earlier listing is given again
        return list(_entries(url, wanted, file_system, inner))

    files = []
    for entry in tried(found, lambda: f"{url}: cannot be listed", url):
        name = file_system.unstrip_protocol(entry["name"])
        versions[name] = version_of(entry)
        files.append((name, entry.get("size") or 0))
    return files


def _entries(url: str, wanted: Callable[[str], bool], file_system: Any, inner: str) -> Iterator[dict[str, Any]]:
    is_http = url.startswith(HTTP)
    # Behind "?" an HTTP address has its query.
    if any(character in inner for character in ("*[" if is_http else "*?[")):
        entries = list(file_system.glob(inner, detail=True).values())
    else:
        try:
            # A directory of HTTP is a page of links.
            top = {"type": "directory"} if is_http and inner.endswith("/") else file_system.info(inner)
        except Exception as error:
            if is_absent(error):
                return
            raise
        if top["type"] == "file" and (top.get("mimetype") != "text/html" or wanted(inner)):
            entries = [top]
        else:
            entries = [e for e in file_system.find(inner, detail=True).values() if wanted(e["name"])]
            root = inner.rstrip("/")
            entries = [e for e in entries if "/." not in e["name"].removeprefix(root)]
    entries = [e for e in entries if e["type"] == "file" and not e["name"].endswith("/")]
    if is_http:
        entries = together(lambda e: e if e.get("size") else file_system.info(e["name"]), entries)
    yield from entries
