"""Files behind URLs: found through fsspec, read in blocks that are fetched ahead, and asked for again when that fails.

A network breaks now and then in two weeks of reading. What may pass (a cut connection, a timeout, a busy server) is
tried again from the byte that was reached; what will not (no such file, no access) is named at once.
"""

from __future__ import annotations

import io
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from openelm.data.backends import file_system_of, is_changed, is_passing, named
from openelm.errors import UserError

Result = TypeVar("Result")

BLOCK_BYTES = 4 << 20  # fetched by one request
FIRST_BLOCK_BYTES = 1 << 20  # much is opened for a few records only
LEAST_BLOCK_BYTES = 256 << 10
# Of all open files together: a file has a block in use and one fetched ahead, smaller ones where many are open.
MEMORY_BYTES = 256 << 20
TRIES = 6
WAIT_S = 1.0  # before the second try; twice as long before each further one
_THREADS = 16
HTTP = ("http://", "https://")
# What tells one content of a file from another, as the listings of S3 and HTTP, Google and the Hub call it.
_VERSION_KEYS = ("size", "ETag", "md5Hash", "crc32c", "blob_id", "xet_hash", "Last-Modified")

versions: dict[str, dict[str, Any]] = {}  # by URL, when it was last listed or first opened
_open_files: weakref.WeakSet[RemoteFile] = weakref.WeakSet()


class NoRanges(Exception):  # noqa: N818 (a fact about a server)
    """The server sends whole files only."""


def version(url: str) -> dict[str, Any]:
    """Size and checksum, or tag, of a file as its server states them: plain values, nothing of it is read."""
    if url not in versions:
        file_system, inner = file_system_of(url)
        info = tried(lambda _: file_system.info(inner), lambda: f"{url}: cannot be looked up", url)
        versions[url] = version_of(info)
    return dict(versions[url])


def gives_ranges(url: str) -> bool:
    """Whether parts of a file can be read alone: HTTP servers need not."""
    if not url.startswith(HTTP):
        return True
    try:
        with RemoteFile(url, random_access=True) as file:
            file.seek(1)
            file.read(1)
    except UserError as error:
        if isinstance(error.__cause__, NoRanges):
            return False
        raise
    return True


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read from ``start``; blocks up to ``end`` are fetched ahead by threads that all files share.

    With ``random_access`` just the bytes that are asked for are fetched, until ``expect`` tells what will be read.
    UserError: not there, no access, changed since it was listed or opened, or not to be had in several tries.
    """

    def __init__(self, url: str, start: int = 0, end: int | None = None, *, random_access: bool = False) -> None:
        self.url = url
        self._position = self._block_start = start
        self._window = (0, 0) if random_access else (start, end)
        self._random_access, self._streamed = random_access, False
        self._block, self._block_bytes = b"", 0
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._connection: _Connection | None = None
        self._size = self._tried(lambda _: self._connect()).size  # None: the server does not tell
        _open_files.add(self)

    def expect(self, start: int, end: int) -> None:
        """Tell that [start, end) will be read in order: it is fetched in blocks, ahead of the reader."""
        self._window = (start, end)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        if base is None:
            if self._size is None:
                raise self._no_ranges()
            base = self._size
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """``size`` bytes; fewer at the end of the file only."""
        if size is None or size < 0:
            return self.readall()
        parts, missing = [], size
        while missing and (part := super().read(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        if not self._block_start <= self._position < self._block_start + len(self._block):
            self._load(len(target))
        offset = self._position - self._block_start
        part = memoryview(self._block)[offset : offset + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._block = b""
            self._drop_ahead()
            _open_files.discard(self)
            self._disconnect()
        super().close()

    def _load(self, wanted: int) -> None:
        """Make the block that begins at the position the current one; empty behind the end."""
        start, self._block = self._position, b""
        data = None
        if self._ahead and self._ahead[0] == start:
            try:
                data = self._ahead[1].result()
            except Exception as error:
                # It is asked for again here, where the reader waits anyway.
                self._disconnect()
                self._streamed |= isinstance(error, NoRanges)
            self._ahead = None
        self._drop_ahead()
        if data is None:
            end = self._end_of_block(start, wanted)
            # A connection that breaks off each time gets smaller and smaller requests, and so goes on.
            data = self._tried(lambda n: self._fetch(start, min(end, start + max(1, (end - start) >> n))))
        self._block_start, self._block = start, data
        self._fetch_ahead(start + len(data))

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            return self._connect().fetch(start, end) if start < end else b""
        except NoRanges as error:
            self._disconnect()
            self._connect()  # which tells if the file came whole because it is another
            if self._random_access or not self.url.startswith(HTTP):
                raise self._no_ranges() from error
            self._streamed = True
            self._disconnect()
            return self._connect().fetch(start, end)

    def _fetch_ahead(self, start: int) -> None:
        # Without a size there is nothing that says when to stop: the reader finds out.
        connection, size = self._connection, self._size
        if connection is not None and size is not None and self._is_expected(start) and start < size:
            end = self._end_of_block(start, 0)
            self._ahead = (start, _in_background(lambda: connection.fetch(start, end)))

    def _is_expected(self, position: int) -> bool:
        start, end = self._window
        return start <= position and (end is None or position < end)

    def _end_of_block(self, start: int, wanted: int) -> int:
        """Where a block ends that begins at ``start``: they grow, within what is expected to be read."""
        ends = [] if self._size is None else [max(start, self._size)]
        if self._is_expected(start):
            share = MEMORY_BYTES // (2 * max(1, len(_open_files)))
            most = max(LEAST_BLOCK_BYTES, min(BLOCK_BYTES, share))
            self._block_bytes = min(most, max(FIRST_BLOCK_BYTES, 2 * self._block_bytes))
            ends += [start + self._block_bytes, self._window[1] or start + self._block_bytes]
        else:
            ends.append(start + min(wanted, BLOCK_BYTES))
        return min(ends)

    def _drop_ahead(self) -> None:
        if self._ahead:
            self._ahead[1].cancel()
            self._ahead = None
            if self._streamed:
                self._disconnect()  # somebody may still be reading from it

    def _connect(self) -> _Connection:
        if self._connection is None:
            self._connection = _Connection(self.url, streamed=self._streamed)
            self._streamed = self._connection.streamed
            if self._streamed and self._random_access:
                raise self._no_ranges()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def _tried(self, action: Callable[[int], Result]) -> Result:
        def once(attempt: int) -> Result:
            if attempt:
                self._disconnect()
            return action(attempt)

        return tried(once, lambda: f"{self.url}: cannot be read at byte {self._position:,}", self.url)

    def _no_ranges(self) -> UserError:
        error = UserError(
            f"{self.url}: its server sends whole files only, and this needs parts of it: "
            "serve it from one that answers range requests, or give the text as .jsonl.zst"
        )
        error.__cause__ = NoRanges()
        return error


class _Connection:
    """One opening of a file: its size (None: not told), and a way to fetch parts of it."""

    def __init__(self, url: str, *, streamed: bool) -> None:
        self.url = url
        self._file_system, self._inner = file_system_of(url)
        self._read = 0  # bytes, where streamed
        if url.startswith(HTTP):
            info = self._open_http(streamed)
        else:
            self._file = self._open_other()
            info = self._file_system.info(self._inner) if self._file is None else self._file.details
            self.streamed = False
        self.size: int | None = info.get("size")
        now, known = version_of(info), versions.setdefault(url, version_of(info))
        for key in now.keys() & known.keys():
            if now[key] != known[key]:
                raise _changed(url, f"{key} was {known[key]} and is {now[key]}")

    def _open_http(self, streamed: bool) -> dict[str, Any]:
        info: dict[str, Any] = self._file_system.info(self._inner)
        self.streamed = streamed or not info.get("size") or info.get("partial") is False
        if self.streamed:
            info["size"] = info.get("size") or None
            self._file = self._file_system.open(self._inner, "rb", size=info["size"], block_size=0)
            return info
        tag = str(info.get("ETag", ""))
        # The server then sends no part of another version. Weak tags are not for parts.
        headers = {"headers": {"If-Range": tag}} if tag.startswith('"') else {}
        self._file = self._file_system.open(self._inner, "rb", size=info["size"], cache_type="none", **headers)
        return info

    def _open_other(self) -> Any:
        """fsspec's file where it fetches ranges; None where the file system itself must be asked."""
        from fsspec.spec import AbstractBufferedFile

        if self._file_system.protocol == "memory":
            return None  # its files are one for all readers, place included
        file = self._file_system.open(self._inner, "rb", cache_type="none")
        if isinstance(file, AbstractBufferedFile):
            return file
        file.close()
        return None

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes [start, end), fewer only at the end of a file without a size. EOFError: the connection ended."""
        if self.streamed:
            data = self._fetch_streamed(start, end)
        elif self._file is None:
            data = self._file_system.cat_file(self._inner, start=start, end=end)
        else:
            try:
                data = self._file._fetch_range(start, end)
            except ValueError as error:
                if "range requests" in str(error):
                    raise NoRanges from error
                raise
            except OSError as error:
                if is_changed(error):
                    raise _changed(self.url, "its server has another version") from error
                raise
        if len(data) > end - start:
            raise NoRanges
        if len(data) < end - start and self.size is not None:
            raise EOFError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    def _fetch_streamed(self, start: int, end: int) -> bytes:
        if start < self._read:
            raise EOFError("the stream is past that byte")
        parts = []
        while self._read < end and (part := self._file.read(min(end - self._read, 1 << 20))):
            if (skipped := max(0, start - self._read)) < len(part):
                parts.append(part[skipped:])
            self._read += len(part)
        return b"".join(parts)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def version_of(info: dict[str, Any]) -> dict[str, Any]:
    """What an entry of a listing says that identifies the content."""
    found = {key: info[key] for key in _VERSION_KEYS if isinstance(info.get(key), int | str)}
    if "ETag" in found:
        found.pop("Last-Modified", None)
    return found


def _changed(url: str, what: str) -> UserError:
    return UserError(
        f"{url}: changed since it was first seen ({what}): a run reads the same text from its start to its end; "
        "restore the file, or begin a new run"
    )


# Trying again


def tried(action: Callable[[int], Result], failure: Callable[[], str], url: str) -> Result:
    """``action`` (given how often it has failed), again while what fails may pass. UserError when it does not."""
    for attempt in range(TRIES):
        try:
            return action(attempt)
        except UserError:
            raise
        except Exception as error:
            if not is_passing(error) or attempt + 1 == TRIES:
                raise named(error, failure(), url, attempt + 1) from error
            # Ranks that failed together do not come back together. Not the module's own generator: it is the user's.
            time.sleep(WAIT_S * 2**attempt * random.Random().uniform(0.5, 1.5))
            file_system, inner = file_system_of(url)
            with suppress(Exception):  # which asks the server too, at the Hub; the next try says what is wrong
                file_system.invalidate_cache(inner)
    raise AssertionError("TRIES is at least one")


# Threads, one set a process


def _in_background(action: Callable[[], bytes]) -> Future[bytes]:
    future: Future[bytes] = Future()
    _tasks(os.getpid()).put((future, action))
    return future


@cache
def _tasks(process: int) -> queue.SimpleQueue[Any]:
    """Where the threads take their work. They end with the process, which waits for no server then."""
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(_THREADS):
        threading.Thread(target=_work, args=(tasks,), name="openelm-read", daemon=True).start()
    return tasks


def _work(tasks: queue.SimpleQueue[Any]) -> None:
    while True:
        future, action = tasks.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)
        del future, action  # else an idle thread keeps a block
