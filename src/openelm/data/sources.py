"""Where text comes from: which files a source has, the parts that can be read alone, and their raw records.

Finding, reading and decoding are apart, so that a reader who owns every n-th document passes over the others
before anything is parsed. Formats: plain text (a file is a document), JSON lines (plain, gzip, zstandard),
Parquet (a row group is read alone), and the Python installation that runs us.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Literal, NamedTuple

from openelm.data.files import PYTHON, find_files, find_library, is_url, open_binary, open_for_parts, peek, together
from openelm.data.remote import HTTP, RemoteFile, gives_ranges
from openelm.errors import UserError

TEXT_ENDINGS = (".txt", ".text", ".md", ".rst", ".tex", ".py")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
COMPRESSED_ENDINGS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
PARQUET_ENDING = ".parquet"

SPLIT_BYTES = 64 << 20  # a longer plain .jsonl is read in ranges of this size
_CHUNK_BYTES = 256 << 10
_ZST_BYTES = 16 << 10  # packed bytes unpacked at a time: what stands before damage among them is lost with it
_PARQUET_ROWS = 256  # rows decoded at a time
# Stands for a null in a Parquet text column: no UTF-8 text has these bytes.
_NULL = b"\xff\xfenull"

Problem = Literal["invalid_utf8", "undecodable"]


class CorruptFile(UserError):  # noqa: N818 (it is named for the file, as UserError is for the user)
    """A damaged file; the reader stops or skips the rest of it, as the source's `on_corrupt` says."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"{path}: damaged ({reason}): a file must be whole to be read to its end: "
            "fetch it again, or set the source's on_corrupt: skip"
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[CorruptFile], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # a worker process sends it to its parent


@dataclass(frozen=True)
class Source:
    """One ingredient of the training text."""

    name: str
    path: str  # file, folder, glob, URL, or "python" for the running Python's own text ("./python" is a folder)
    share: float = 1.0  # of the mixture's valid tokens, relative to the other sources
    text_key: str = "text"  # JSON key or Parquet column
    on_corrupt: Literal["stop", "skip"] = "stop"
    on_invalid_utf8: Literal["repair", "skip"] = "repair"


@dataclass(frozen=True)
class Unit:
    """The smallest part of a source that is read alone."""

    path: str
    format: str  # "text", "jsonl" (either may end in ".gz" or ".zst"), "parquet", "python-topics"
    part: int = 0  # Parquet row group, or number of the byte range
    start: int = 0  # byte range of a plain .jsonl: the lines that begin in [start, end)
    end: int | None = None  # None: to the end of the file
    size_bytes: int = 0  # as stored; uncompressed text column for Parquet


class Decoded(NamedTuple):
    """A record's text, None when it has none; and what was wrong with it, None when nothing was."""

    text: str | None
    problem: Problem | None


def find_units(source: Source) -> list[Unit]:
    """All parts of a source, sorted by path, then part.

    A damaged Parquet file is one unit, so that reading it reports the damage.
    UserError: nothing found, no such column, a .json file that is not one object a line.
    """
    if source.path == "python":
        units = _library_units()
    else:
        files = find_files(source.path, _is_known)
        each = together if is_url(source.path) else map
        units = [unit for found in each(lambda file: _units_of_file(file[0], file[1], source), files) for unit in found]
    if not units:
        endings = ", ".join((*TEXT_ENDINGS, *JSON_ENDINGS, PARQUET_ENDING))
        raise UserError(
            f"source {source.name}: nothing to read at {source.path!r}: a source is a file, a glob, or a folder with "
            f"files ending in {endings} (all but {PARQUET_ENDING} also .gz or .zst): check the path"
        )
    return units


def read_records(unit: Unit, source: Source) -> Iterator[bytes]:
    """Raw records of a unit in file order: JSON lines, Parquet texts, or the content of a text file.

    JSON lines are streamed in constant memory. CorruptFile is raised after the records before the damage.
    """
    kind, _, compression = unit.format.partition(".")
    if kind == "parquet":
        yield from _parquet_records(unit, source)
    elif kind == "python-topics":
        yield from _topic_records()
    else:
        with open_binary(unit.path, max(0, unit.start - 1), unit.end) as file:
            if kind == "text":
                yield b"".join(chunks(file, compression, unit.path))
            elif compression:
                yield from (line for line in lines_of(chunks(file, compression, unit.path)) if line.strip())
            else:
                yield from _lines_of_range(file, unit.start, unit.end)


def decode_record(raw: bytes, unit: Unit, source: Source) -> Decoded:
    """Text of a raw record. UserError: the JSON object has no text under `source.text_key`."""
    problem: Problem | None = None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        if raw == _NULL:
            return Decoded(None, "undecodable")
        problem = "invalid_utf8"
        if source.on_invalid_utf8 == "skip":
            return Decoded(None, problem)
        text = raw.decode("utf-8", "replace")
    text = text.removeprefix("\ufeff")  # the byte order mark that some editors put first
    if not unit.format.startswith("jsonl"):
        return Decoded(text, problem)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Decoded(None, "undecodable")
    if not isinstance(record, dict) or (value := _text_value(record, unit, source)) is None:
        return Decoded(None, "undecodable")
    if ("\\ud" in text or "\\uD" in text) and not _is_encodable(value):
        # JSON can spell half a surrogate pair, which no UTF-8 text holds.
        if source.on_invalid_utf8 == "skip":
            return Decoded(None, "invalid_utf8")
        return Decoded(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "invalid_utf8")
    return Decoded(value, problem)


def _text_value(record: dict[str, Any], unit: Unit, source: Source) -> str | None:
    key = source.text_key
    value = record.get(key)
    if isinstance(value, str) or (value is None and key in record):
        return value
    there = ", ".join(map(repr, record)) or "no keys"
    found = f"{key!r} is a {type(value).__name__}" if key in record else f"no key {key!r}"
    raise UserError(
        f"{unit.path}: {found}; each line must be an object with text under text_key; this one has {there}: "
        f"set text_key of source {source.name}"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Finding units


def _is_known(name: str) -> bool:
    """Whether a file in a folder is data, by its name."""
    stem, compression = _stem(name)
    return stem.endswith(TEXT_ENDINGS + JSON_ENDINGS) or (stem.endswith(PARQUET_ENDING) and not compression)


def _stem(path: str) -> tuple[str, str]:
    """Lower-case name without the ending of its compression, and that compression ("gz", "zst" or "")."""
    name = path.lower()
    if name.startswith(HTTP):
        name = name.partition("?")[0]
    for ending, compression in COMPRESSED_ENDINGS.items():
        if name.endswith(ending):
            return name[: -len(ending)], compression
    return name, ""


def format_of(path: str, head: bytes) -> str:
    """Format of a file from its first bytes where they tell (head is b"" behind a URL), else from its name."""
    stem, compression = _stem(path)
    if head.startswith(b"PAR1") or stem.endswith(PARQUET_ENDING):
        return "parquet"
    if head.startswith(b"\x1f\x8b"):
        compression = "gz"
    elif head.startswith(b"\x28\xb5\x2f\xfd") or re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        compression = "zst"  # the second is zstandard's skippable frame, with which parallel compressors begin
    elif head.lstrip().startswith(b"{"):
        compression = ""  # downloaders often unpack and keep the name
    is_json = stem.endswith(JSON_ENDINGS) or (compression and not stem.endswith(TEXT_ENDINGS))
    kind = "jsonl" if is_json else "text"
    return f"{kind}.{compression}" if compression else kind


def _units_of_file(path: str, size: int, source: Source) -> list[Unit]:
    # The text of a folder may be a hundred thousand small files: their names are trusted, not opened.
    head = b"" if path.lower().endswith(TEXT_ENDINGS) else peek(path)
    kind = format_of(path, head)
    if kind == "parquet":
        return _parquet_units(path, size, source)
    if kind == "jsonl":
        if re.match(rb"\s*(\[|\{\s*\n)", head):
            raise UserError(
                f"{path}: one JSON value over many lines; JSON text is read as one object a line: "
                f"convert it, for example with `jq -c '.[]' {path}`"
            )
        if size > SPLIT_BYTES and (not is_url(path) or gives_ranges(path)):
            starts = range(0, size, SPLIT_BYTES)
            ends = [min(start + SPLIT_BYTES, size) for start in starts]
            return [
                Unit(path, kind, part, start, end, end - start)
                for part, (start, end) in enumerate(zip(starts, ends, strict=True))
            ]
    return [Unit(path, kind, size_bytes=size)]


def _library_units() -> list[Unit]:
    units = [Unit(path, "text", size_bytes=size) for path, size in find_library()]
    if topics_bytes := sum(map(len, _topic_records())):
        units.append(Unit(f"{PYTHON}pydoc_data/topics", "python-topics", size_bytes=topics_bytes))
    return sorted(units, key=lambda unit: unit.path)


def _topic_records() -> Iterator[bytes]:
    """Python's help topics, one a record, by name; none where the installation lacks them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name].encode("utf-8")


# Lines and compression


def _lines_of_range(file: BufferedReader, start: int, end: int | None) -> Iterator[bytes]:
    """Lines that begin in [start, end), blank ones left out."""
    position = start
    if start:
        # From one byte before, the rest of a line is skipped: nothing but "\n" when a line begins at `start`.
        file.seek(start - 1)
        position += len(file.readline()) - 1
    for line in file:
        if end is not None and position >= end:
            return
        position += len(line)
        if not line.isspace():
            yield line.rstrip(b"\n")


def lines_of(parts_of_file: Iterator[bytes]) -> Iterator[bytes]:
    """Lines of a stream, blank ones too. Parts of a long line are joined once, at its end."""
    parts: list[bytes] = []
    for chunk in parts_of_file:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    if line := b"".join(parts):
        yield line


def chunks(file: BufferedReader, compression: str, path: str) -> Iterator[bytes]:
    """Content of a file in parts of bounded size. CorruptFile when compressed data are damaged or cut short."""
    if compression == "gz":
        return _gzip_chunks(file, path)
    if compression == "zst":
        return _zstandard_chunks(file, path)
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def _gzip_chunks(file: BufferedReader, path: str) -> Iterator[bytes]:
    import gzip
    import zlib

    if not file.peek(1):
        raise CorruptFile(path, "the file is empty")
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            # read1 gives what is whole before it meets the damage; read would keep it.
            while chunk := unpacked.read1(_CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFile(path, str(error)) from error


def _zstandard_chunks(file: BufferedReader, path: str) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files of `zstd --long=31` too
    frame = unpacker.decompressobj()
    frame_begun = False
    if not file.peek(1):
        raise CorruptFile(path, "the file is empty")
    try:
        while packed := file.read(_ZST_BYTES):
            while packed:
                frame_begun = True
                if chunk := frame.decompress(packed):
                    yield chunk
                packed = b""
                if frame.eof:
                    packed, frame, frame_begun = frame.unused_data, unpacker.decompressobj(), False
    except zstandard.ZstdError as error:
        raise CorruptFile(path, str(error)) from error
    if frame_begun:
        raise CorruptFile(path, "it ends in the middle of a frame")


# Parquet


def _parquet_units(path: str, size: int, source: Source) -> list[Unit]:
    try:
        with open_for_parts(path) as file:
            metadata = _open_parquet(file, path, source).metadata
    except CorruptFile:
        return [Unit(path, "parquet", size_bytes=size)]
    units = []
    for group in range(metadata.num_row_groups):
        columns = map(metadata.row_group(group).column, range(metadata.num_columns))
        text_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == source.text_key)
        units.append(Unit(path, "parquet", part=group, size_bytes=text_bytes))
    return units


def _parquet_records(unit: Unit, source: Source) -> Iterator[bytes]:
    import pyarrow

    with open_for_parts(unit.path) as file:
        parquet = _open_parquet(file, unit.path, source)
        if isinstance(file, RemoteFile):
            file.expect(*_text_range(parquet.metadata.row_group(unit.part), source))
        batches = parquet.iter_batches(_PARQUET_ROWS, row_groups=[unit.part], columns=[source.text_key])
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise CorruptFile(unit.path, str(error)) from error
            if batch is None:
                return
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for text in column.cast(pyarrow.large_binary()).to_pylist():
                yield _NULL if text is None else text


def _text_range(row_group: Any, source: Source) -> tuple[int, int]:
    """The bytes of a row group that hold its text column."""
    columns = map(row_group.column, range(row_group.num_columns))
    column = next(c for c in columns if c.path_in_schema == source.text_key)
    start = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset)
    return start, start + column.total_compressed_size


def _open_parquet(file: BufferedReader | RemoteFile, path: str, source: Source) -> Any:
    """pyarrow's ParquetFile, its text column checked. CorruptFile, or UserError with the columns there are."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a buffer pyarrow takes a whole column of a row group at once, whatever its size.
        buffer_bytes = _CHUNK_BYTES if isinstance(file, RemoteFile) else 0
        opened = parquet.ParquetFile(file, page_checksum_verification=True, buffer_size=buffer_bytes)
        schema = opened.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptFile(path, str(error)) from error
    if source.text_key not in schema.names:
        raise UserError(
            f"{path}: no column {source.text_key!r}; the text is read from one column; the columns there are "
            f"{', '.join(map(repr, schema.names))}: set text_key of source {source.name}"
        )
    held = schema.field(source.text_key).type
    held = held.value_type if pyarrow.types.is_dictionary(held) else held
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    is_bytes = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    if not any(check(held) for check in (*is_text, *is_bytes)):
        raise UserError(
            f"{path}: column {source.text_key!r} holds {held}; a text column holds strings: "
            f"set text_key of source {source.name}"
        )
    return opened
