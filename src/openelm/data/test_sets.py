"""Test sets as texts: one example after another, from files of JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

from openelm.data.files import open_for_parts
from openelm.data.sources import CorruptFile, Source, find_units, read_records
from openelm.errors import UserError


class TestExample(NamedTuple):
    """A text that a model is tested with."""

    set: str
    id: str
    text: str


def read_examples(path: str, field: str | None = None) -> Iterator[TestExample]:
    """Examples of a file of JSON lines (also .gz, .zst) or Parquet: the text of ``field``, or all text of a row.

    An example is called by the row's "id" where it has one, else by its number, from 0. UserError: no such file or
    field, another format, no text at all.
    """
    any_text = False
    for number, row in enumerate(_rows(path)):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is a {type(row).__name__}: each row must be an object with text")
        name = row.get("id")
        if field is None:
            text = "\n".join(_strings({key: value for key, value in row.items() if key != "id"}))
        elif isinstance(value := row.get(field), str):
            text = value
        else:
            there = ", ".join(key for key, value in row.items() if isinstance(value, str)) or "none"
            raise UserError(
                f"{path}: row {number} has no text in a field {field!r}: its fields with text are {there}: name one of "
                "them, or none to compare them all"
            )
        any_text = any_text or bool(text.strip())
        yield TestExample(path, str(number if name is None else name), text)
    if not any_text:
        raise UserError(f"{path}: no text in it: a test set has rows with text; check the file")


def _rows(path: str) -> Iterator[Any]:
    if path.lower().endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    source = Source(name=path, path=path)
    rows = count()
    for unit in find_units(source):
        if not unit.format.startswith("jsonl"):
            raise UserError(
                f"{unit.path}: a test set is a file of JSON lines, one object an example (.jsonl, also .gz or .zst), "
                "or of Parquet: convert it"
            )
        for record, number in zip(read_records(unit, source), rows, strict=False):
            try:
                yield json.loads(record)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{unit.path}: row {number} is not JSON ({error}): one object a line is read"
                ) from error


def _parquet_rows(path: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    with open_for_parts(path) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(1024):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise CorruptFile(path, str(error)) from error


def _strings(value: Any) -> Iterator[str]:
    """All strings of a JSON value, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
