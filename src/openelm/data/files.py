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
from pathlib import Path
from typing import Any

from openelm.errors import UserError

PYTHON = "python:"
# Tests are left out of the Python installation's text: they are bulky, odd, and absent on many machines.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
_BUFFER_BYTES = 1 << 20


def is_url(path: str) -> bool:
    """Whether fsspec, not the local file system, opens `path`."""
    return "://" in path


def open_binary(path: str) -> io.BufferedReader:
    """Open any path for reading bytes. UserError: not there, not readable, or its backend is not installed."""
    try:
        if is_url(path):
            file_system, inner = _file_system(path)
            return io.BufferedReader(file_system.open(inner, "rb"), _BUFFER_BYTES)
        if path.startswith(PYTHON):
            return io.BufferedReader(io.FileIO(_library_folder() / path[len(PYTHON) :]), _BUFFER_BYTES)
        return io.BufferedReader(io.FileIO(path), _BUFFER_BYTES)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be opened ({reason}): check the path and your access to it") from error


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


def _find_remote(url: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    file_system, inner = _file_system(url)
    try:
        if any(character in inner for character in "*?["):
            entries = file_system.glob(inner, detail=True).values()
        elif file_system.isdir(inner):
            entries = [e for e in file_system.find(inner, detail=True).values() if wanted(e["name"])]
        elif file_system.exists(inner):
            entries = [file_system.info(inner)]
        else:
            return
    except OSError as error:
        raise UserError(f"{url}: cannot be listed ({error}): check the address and your access to it") from error
    for entry in entries:
        if entry["type"] == "file":
            yield file_system.unstrip_protocol(entry["name"]), entry.get("size") or 0


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path inside it."""
    import fsspec

    try:
        file_system, inner = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url}: its backend is not installed ({error}): pip install 'openelm-framework[remote]'"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{url}: {error}: use a local path or s3://, gs://, hf:// or https:// "
            "(pip install 'openelm-framework[remote]')"
        ) from error
    return file_system, inner
