"""Writing files and folders so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openelm.errors import UserError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the name ``path`` only once all is written and synced.

    Raises UserError where ``path`` exists and ``overwrite`` is off, and where the disk is full: then nothing is left.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten unasked: choose another name, or pass --overwrite")
    draft = path.parent / f".{path.name}.tmp-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with disk_errors_named(path):
            draft.mkdir(parents=True)
            yield draft
            for file in [*draft.rglob("*"), draft]:
                sync(file)
            put_in_place(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, path: Path) -> None:
    """Give a draft, synced already, its name; a folder that had the name goes away only then."""
    old = _move_away(path) if path.exists() else None
    try:
        draft.rename(path)
    except OSError:
        if old:
            old.rename(path)
        raise
    sync(path.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write; it replaces ``path`` only once it is whole and synced."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with disk_errors_named(path):
            yield draft
            sync(draft)
            draft.replace(path)
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_bytes(content)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_folder(path: Path) -> None:
    """Delete a folder; killed half-way, it leaves a draft and no half folder under the name."""
    draft = path.parent / f".{path.name}.tmp-{os.getpid()}"
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Delete what a killed writer (of ``name``, or of anything) left behind in ``folder``."""
    for old in folder.glob(f".{name}.old"):
        # A writer was killed between taking the old folder away and putting the new one there.
        final = folder / old.name[1:].removesuffix(".old")
        shutil.rmtree(old, ignore_errors=True) if final.exists() else old.rename(final)
    for draft in folder.glob(f".{name}.tmp-*"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _move_away(path: Path) -> Path:
    """Take an old folder off its name in one step."""
    old = path.parent / f".{path.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    return old


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder; those that are full say so here at the latest.
        if error.errno in _NO_SPACE or path.is_file():
            raise
    finally:
        os.close(handle)


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn a full disk and a place that cannot be written to into a UserError about ``path``."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in _NO_SPACE:
            raise UserError(
                f"no space left for {path} ({os.strerror(number)}): nothing of it was kept; free some disk"
            ) from error
        if number in _NOT_WRITABLE:
            raise UserError(
                f"{path} cannot be written ({os.strerror(number)}): choose a place that is yours to write to"
            ) from error
        raise


def _error_number(error: Exception) -> int:
    """The system's number of an error; safetensors, written in Rust, only spells it out."""
    if isinstance(error, OSError):
        return error.errno or 0
    spelt = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(spelt[1]) if spelt else 0
