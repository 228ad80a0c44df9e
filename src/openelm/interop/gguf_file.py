"""GGUF files, read with suspicion: no count, length or offset is followed before the file is seen to be long enough."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from openelm.errors import UserError

VERSIONS = (2, 3)
# More than any model needs, and little enough to be gone through in seconds: the vocabulary and merges of the largest
# tokenizers take half of it, the deepest models have a few thousand tensors.
MOST_HEADER_BYTES, MOST_ENTRIES = 2**25, 2**16
MOST_DIMENSIONS = 4
CHUNK_VALUES = 2**22  # read out of blocks at once

# Number in the file -> name, values in a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8", 11: "<i8"}
_NUMBERS[12] = "<f8"


def need_gguf() -> None:
    """UserError where the package that knows llama.cpp's blocks, and writes its files, is not there."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("GGUF is written by the package gguf: pip install 'openelm-framework[gguf]'") from error


@dataclass(frozen=True)
class Stored:
    """A tensor in the file."""

    shape: tuple[int, ...]  # rows first, the other way round from the file
    kind: str  # the name of its type
    offset: int  # from the start of the file, in bytes
    num_bytes: int


class GGUFFile:
    """Metadata and tensors of a little-endian GGUF file. Lists of numbers in the metadata are NumPy arrays.

    Only the header is read at first, a tensor when it is asked for. UserError for a file that is damaged, cut short, or
    that claims what cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                header = _Header(path, file, path.stat().st_size)
                self.metadata, self.tensors = header.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give a readable GGUF file") from error

    def read(self, name: str) -> Tensor:
        """A tensor: F32, F16 and BF16 as it is stored, of another type as the fp32 values that its blocks stand for."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=DTYPES.get(stored.kind, torch.float32))
        with self.path.open("rb") as file:
            file.seek(stored.offset)
            if stored.kind in DTYPES:
                self._fill(file, tensor, name)
            else:
                self._fill_from_blocks(file, tensor, name)
        return tensor

    def _fill(self, file: BinaryIO, tensor: Tensor, name: str) -> None:
        view = tensor.view(-1).view(torch.uint8).numpy().data
        if file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise UserError(f"{self.path} ends within {name}: it was changed while it was read; start again")

    def _fill_from_blocks(self, file: BinaryIO, tensor: Tensor, name: str) -> None:
        """Some rows at a time: what a type stands for is computed with several copies of them."""
        from gguf import GGMLQuantizationType, quants

        stored = self.tensors[name]
        rows = tensor.view(-1, stored.shape[-1])
        for part in rows.split(max(CHUNK_VALUES // stored.shape[-1], 1)):
            blocks = torch.empty(len(part), stored.num_bytes // len(rows), dtype=torch.uint8)
            self._fill(file, blocks, name)
            with np.errstate(all="ignore"):  # scales that are NaN or infinite are refused by whoever takes the tensor
                values = quants.dequantize(blocks.numpy(), GGMLQuantizationType[stored.kind])
            part.copy_(torch.from_numpy(values))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A single value of the metadata. UserError where it is of another kind, or missing without a default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path} lacks {key} in its metadata, without which there is no model")
        if value is not default and not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
            raise UserError(f"{self.path}: {key} is {str(value)[:40]!r}, and should be of type {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings of the metadata; [] where there is none. UserError where it is something else."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise UserError(f"{self.path}: {key} should be a list of strings")
        return value

    def numbers(self, key: str) -> list[Any]:
        """A list of numbers of the metadata; [] where there is none. UserError where it is something else."""
        value = self.metadata.get(key, np.empty(0))
        if not isinstance(value, np.ndarray):
            raise UserError(f"{self.path}: {key} should be a list of numbers")
        numbers: list[Any] = value.tolist()
        return numbers


class _Header:
    """All that stands before the tensors' bytes; each part is taken only where the file still has that much."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._end = min(size, MOST_HEADER_BYTES)
        self._position = 0

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """The metadata, and where each tensor is."""
        if self._take(4, "the first bytes") != b"GGUF":
            raise self._refused("it does not begin with GGUF")
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise self._refused("it is big-endian, and only little-endian files can be read; convert it again")
        if version not in VERSIONS:
            raise self._refused(f"it is of version {version}, and only 2 and 3 can be read; convert it again")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        # The least that one takes: a tensor's name, dimensions, type and offset; a key, a type and a byte.
        self._check_count(tensors, 32, "tensors")
        self._check_count(pairs, 13, "entries of metadata")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string("a key")
            if key in metadata:
                raise self._refused(f"the key {key} stands twice")
            metadata[key] = self._value(key, self._number("<I"))
        found: dict[str, Stored] = {}
        for _ in range(tensors):
            name, stored = self._tensor()
            if name in found:
                raise self._refused(f"the tensor {name} stands twice")
            found[name] = stored
        return metadata, self._placed(found, metadata.get("general.alignment", 32))

    def _tensor(self) -> tuple[str, Stored]:
        """Name and description of the next tensor, with its offset still from the end of the header."""
        name = self._string("the name of a tensor")
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._refused(f"{name} has {dimensions} dimensions, and 1 to {MOST_DIMENSIONS} are possible")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        number, offset = self._number("<I"), self._number("<Q")
        if number not in TYPES:
            raise self._refused(f"{name} is of type {number}, which is unknown here", damaged=False)
        kind, block, block_bytes = TYPES[number]
        if 0 in shape or shape[-1] % block:
            raise self._refused(f"{name} has shape {shape}, which {kind} cannot have")
        return name, Stored(shape, kind, offset, math.prod(shape) // block * block_bytes)

    def _placed(self, tensors: dict[str, Stored], alignment: Any) -> dict[str, Stored]:
        """The tensors with offsets from the start of the file: all inside it, none in another's place."""
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._refused(f"its alignment is {alignment}, and must be a power of two, at least 8")
        start = -(-self._position // alignment) * alignment
        placed, end, before = {}, start, "the header"
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
            offset = start + stored.offset
            if stored.offset % alignment:
                raise self._refused(f"{name} stands at offset {stored.offset}, not a multiple of {alignment}")
            if offset < end:
                raise self._refused(f"{name} overlaps {before}")
            end, before = offset + stored.num_bytes, name
            if end > self._size:
                raise self._refused(f"{name} would end at byte {end:,} of {self._size:,}")
            placed[name] = Stored(stored.shape, stored.kind, offset, stored.num_bytes)
        return placed

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _NUMBERS:
            return self._array(key, kind, 1)[0].item()
        if kind != _ARRAY:
            raise self._refused(f"{key} is of kind {kind}, which is unknown")
        element, count = self._number("<I"), self._number("<Q")
        if element == _STRING:
            self._check_room(8 * count, f"the {count:,} strings of {key}")
            return [self._string(key) for _ in range(count)]
        if element not in _NUMBERS:
            raise self._refused(f"{key} is a list of kind {element}, and only numbers and strings can be listed")
        return self._array(key, element, count)

    def _array(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize * count, key), dtype)

    def _string(self, what: str) -> str:
        try:
            return self._take(self._number("<Q"), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refused(f"{what} is not UTF-8") from error

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form), "the header"))
        assert isinstance(value, int)
        return value

    def _take(self, count: int, what: str) -> bytes:
        self._check_room(count, what)
        self._position += count
        data = self._file.read(count)
        if len(data) != count:
            raise self._refused("it became shorter while it was read")
        return data

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        self._check_room(least_bytes * count, f"{count:,} {what}")
        if count > MOST_ENTRIES:
            raise self._refused(f"it claims {count:,} {what}, and no model has more than {MOST_ENTRIES:,}")

    def _check_room(self, count: int, what: str) -> None:
        left = self._end - self._position
        if count > left:
            raise self._refused(f"{what} would take {count:,} bytes, and {left:,} are left for the header")

    def _refused(self, what: str, *, damaged: bool = True) -> UserError:
        remedy = "it is damaged or cut short" if damaged else "take an F32, F16 or BF16 file of the model"
        return UserError(f"{self._path} cannot be read as GGUF ({what}): {remedy}")
