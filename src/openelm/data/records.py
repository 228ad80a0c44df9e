"""Whole records, every column of them: JSON lines, a JSON list, Parquet; local or behind a URL.

The token stream reads one text column of endless data (sources.py); tuning sets and test sets are read whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from openelm.data.files import find_files, open_binary, open_for_parts, peek
from openelm.data.sources import (
    COMPRESSED_ENDINGS,
    JSON_ENDINGS,
    PARQUET_ENDING,
    CorruptFile,
    chunks,
    format_of,
    lines_of,
)
from openelm.errors import UserError

Record = dict[str, Any]

_ENDINGS = (*JSON_ENDINGS, *(end + packed for end in JSON_ENDINGS for packed in COMPRESSED_ENDINGS), PARQUET_ENDING)
_ROWS = 256  # of Parquet, decoded at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def find(path: str) -> list[str]:
    """The files that a file, folder, glob or URL stands for, sorted; UserError where there is none."""
    files = [file for file, _ in find_files(path, lambda name: name.lower().endswith(_ENDINGS))]
    if not files:
        raise UserError(
            f"nothing to read at {path!r}: records are read from a file, a glob, or a folder with files ending in "
            f"{', '.join(JSON_ENDINGS)} (also .gz or .zst) or {PARQUET_ENDING}: check the path"
        )
    return files


def records(path: str) -> Iterator[Record]:
    """The records of all files that a path stands for, one file after another."""
    for file in find(path):
        yield from read(file)


def read(file: str) -> Iterator[Record]:
    """The records of one file, in order. UserError naming the file, and the line or the entry of a list."""
    kind, _, compression = format_of(file, peek(file)).partition(".")
    try:
        if kind == "parquet":
            yield from _parquet_records(file)
        elif kind == "jsonl":
            yield from _json_records(file, compression)
        else:
            raise UserError(
                f"{file}: records are read from files ending in {', '.join(JSON_ENDINGS)} (also .gz or .zst) or "
                f"{PARQUET_ENDING}: convert it, or rename it"
            )
    except CorruptFile as error:
        raise UserError(f"{file}: damaged ({error.reason}): fetch it again") from error


def _json_records(file: str, compression: str) -> Iterator[Record]:
    with open_binary(file) as opened:
        parts = chunks(opened, compression, file)
        first = next(parts, b"").removeprefix(_BYTE_ORDER_MARK)
        parts = chain([first], parts)
        # A line that is a list is no record: only what is called .json may be one list over many lines.
        if _is_json(file) and first.lstrip().startswith(b"["):
            entries = _parsed(b"".join(parts), f"{file}: its JSON list")
            found = ((f"{file}: entry {number} of its list", entry) for number, entry in enumerate(entries, start=1))
        else:
            found = (
                (where, _parsed(line, where))
                for number, line in enumerate(lines_of(parts), start=1)
                if line.strip()
                for where in [f"{file}: line {number}"]
            )
        for where, record in found:
            if not isinstance(record, dict):
                raise UserError(f"{where} is no JSON object: each record is one, with the columns as keys")
            yield record


def _is_json(file: str) -> bool:
    """Whether a file is called .json, packed or not, with a query behind it or not."""
    name = file.lower().partition("?")[0]
    return name.endswith((".json", *(".json" + packed for packed in COMPRESSED_ENDINGS)))


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} cannot be read ({error}): JSON is UTF-8: convert it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}): mend it, or fetch the file again") from error


def _parquet_records(file: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    with open_for_parts(file) as opened:
        try:
            for batch in parquet.ParquetFile(opened).iter_batches(_ROWS):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise CorruptFile(file, " ".join(str(error).split())) from error
