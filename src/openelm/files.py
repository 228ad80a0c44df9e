"""Writing files and folders so that nothing half-written is ever found under its final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openelm.errors import UserError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it takes the name ``path`` only once all is written and synced.

    Raises UserError where ``path`` exists and ``overwrite`` is off, and where the disk is full: then nothing is left.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten unasked: choose another name, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.tmp-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with _full_disk_named(path):
            draft.mkdir()
            yield draft
            for file in [*draft.rglob("*"), draft]:
                _sync(file)
            old = _move_away(path) if path.exists() else None
            draft.rename(path)
            _sync(path.parent)
            if old:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write; it replaces ``path`` only once it is whole and synced."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with _full_disk_named(path):
            yield draft
            _sync(draft)
            draft.replace(path)
            _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_drafts(folder: Path) -> None:
    """Delete what a killed writer left behind in ``folder``."""
    for old in folder.glob(".*.old"):
        # A writer was killed between taking the old folder away and putting the new one there.
        name = folder / old.name[1:].removesuffix(".old")
        shutil.rmtree(old, ignore_errors=True) if name.exists() else old.rename(name)
    for draft in folder.glob(".*.tmp-*"):
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


def _sync(path: Path) -> None:
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
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"no space left for {path} ({os.strerror(error.errno or 0)}): nothing of it was kept; free some disk"
            ) from error
        raise
