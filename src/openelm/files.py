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
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the name ``path`` only once all is written and synced.

    Raises UserError where ``path`` exists and ``overwrite`` is off, and where the disk is full: then nothing is left.
    """
    path = _followed(path)
    _check_free(path, overwrite)
    draft = path.parent / f".{path.name}.tmp-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with disk_errors_named(path):
            draft.mkdir(parents=True)
            yield draft
            for file in [*draft.rglob("*"), draft]:
                sync(file)
            _check_free(path, overwrite)  # somebody else may have taken the name meanwhile
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


def _followed(path: Path) -> Path:
    """What a link points to: that is replaced, and the link stays."""
    return Path(path).resolve() if Path(path).is_symlink() else Path(path)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten unasked: choose another name, or pass --overwrite")


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A file to write; it replaces ``path`` only once it is whole and synced.

    Raises UserError where ``path`` exists and ``overwrite`` is off, and where the disk is full.
    """
    path = _followed(path)
    _check_free(path, overwrite)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            sync(draft)
            _check_free(path, overwrite)
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


def remove_drafts(folder: Path, name: str = "*", *, of_the_dead: bool = False) -> None:
    """Delete what a killed writer (of ``name``, or of anything) left behind in ``folder``.

    ``of_the_dead`` leaves alone the drafts of processes that live here: others may be writing under the same name.
    """
    for old in folder.glob(f".{name}.old"):
        # A writer was killed between taking the old folder away and putting the new one there.
        final = folder / old.name[1:].removesuffix(".old")
        shutil.rmtree(old, ignore_errors=True) if final.exists() else old.rename(final)
    for draft in folder.glob(f".{name}.tmp-*"):
        if of_the_dead and _lives(draft.name.rpartition("-")[2]):
            continue
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _lives(process: str) -> bool:
    """Whether a process of that number runs here; what is no number is taken for one that does."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


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
