"""Tensors in safetensors files: their names, a folder's files, and reading what is whole, cut by rows, or quantised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openelm.errors import UserError
from openelm.model.quantize import Quantized, dequantize, packed_columns

PLACES = "openelm.rows"  # in a file's metadata: JSON of {tensor: [first row, shape of the whole]}
OPEN_FILES = 16  # that a reader keeps open
OPEN_BYTES = 2**27  # that it reads before it opens them anew: what was read stays in memory till then
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS = 4096  # of two matrices that are compared


def to_folder_name(name: str) -> str:
    """A tensor's name in the folder (Hugging Face's) from the one inside the package (CoreNet's)."""
    return "lm_head.weight" if name == "classifier.weight" else f"transformer.{name}"


def from_folder_name(name: str) -> str:
    """The other way round."""
    if name.startswith("lm_head."):
        return name.replace("lm_head", "classifier", 1)
    return name.removeprefix("transformer.")


@dataclass(frozen=True)
class Slice:
    """What one holder has of a tensor: rows from ``first_row`` on; ``shape`` is that of the whole tensor."""

    tensor: Tensor
    first_row: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Slice:
        """All of a tensor."""
        return cls(tensor, 0, tuple(tensor.shape))


def save_slices(file: Path, slices: dict[str, Slice]) -> None:
    """Write slices as one safetensors file, whose metadata says where each stands in its whole tensor."""
    tensors = {name: piece.tensor.detach().cpu().contiguous() for name, piece in slices.items()}
    places = {name: [piece.first_row, list(piece.shape)] for name, piece in slices.items()}
    # One entry only: safetensors writes several in any order, and the same slices are to give the same bytes.
    save_file(tensors, file, metadata={PLACES: json.dumps(places)})


@dataclass(frozen=True)
class _Piece:
    file: Path
    stored: str  # its name there
    kind: str  # dtype, as safetensors spells it
    first_row: int
    rows: int
    whole: tuple[int, ...]  # shape of the tensor that it is a piece of


@dataclass(frozen=True)
class Packing:
    """How a matrix is quantised (model/quantize.py)."""

    bits: int
    group_size: int


class StoredTensors:
    """The tensors of safetensors files, whole or cut by rows over several; only what is asked for is read.

    ``rename`` gives the name to ask by from the one in the file. ``packing`` says how the matrix NAME.weight, beside
    which there is NAME.scales, is quantised: it is then read as the values that it stands for. Raises UserError where a
    file is damaged, or where the rows of a tensor are not all there exactly once.
    """

    def __init__(
        self,
        files: list[Path],
        rename: Callable[[str], str] = str,
        packing: Callable[[str], Packing | None] = lambda _: None,
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder = files[0].parent
        self._pieces: dict[str, list[_Piece]] = {}
        self._packings: dict[str, Packing] = {}
        self._opened: dict[Path, Any] = {}
        self._read_bytes = 0  # from those
        for file in files:
            self._add(file, rename)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: (piece.first_row, piece.rows))
            _check_rows(pieces, self.shapes[name])
        for name in [name for name in self.shapes if name.endswith(".scales")]:
            stored = self._pieces[name][0].stored.removesuffix(".scales")
            if (found := packing(stored)) is not None:
                self._unite(name.removesuffix(".scales"), found)

    @property
    def quantized_dtype(self) -> torch.dtype | None:
        """What quantised matrices stand for: the dtype of the scales; None where no matrix is quantised."""
        for name in self._packings:
            return self._mapped(self._pieces[_triple(name)[1]][0]).dtype
        return None

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError where these are not the tensors of a model with ``shapes``, naming the first that differs."""
        for name, found in self.shapes.items():
            piece = self._pieces[name][0]
            if name == "classifier.weight" and name not in shapes:
                self._check_shared()
                continue
            if name not in shapes:
                what = "which a model of this config.json does not have"
                if name.endswith((".scales", ".biases")):
                    what = "of a quantised matrix, but it has no scales or config.json does not say how it is quantised"
                raise UserError(f"{piece.file} holds {piece.stored}, {what}")
            if piece.kind not in FLOATS and name not in self._packings:
                raise UserError(
                    f"{piece.file}: {piece.stored} is of {piece.kind}: weights must be of {', '.join(FLOATS)}, or "
                    "quantised, with scales beside them and a quantization in config.json"
                )
            if found != shapes[name]:
                raise UserError(f"{piece.file}: {piece.stored} has shape {found}, but config.json gives {shapes[name]}")
        if missing := shapes.keys() - self.shapes.keys():
            first = to_folder_name(min(missing))
            raise UserError(f"{self._folder} lacks {len(missing)} tensors, the first of them {first}")

    def _check_shared(self) -> None:
        """Some tools write the shared embedding twice; UserError where the second is another matrix."""
        table, head = "token_embeddings.weight", "classifier.weight"
        rows = self.shapes[head][0]
        same = self.shapes.get(table) == self.shapes[head] and all(
            torch.equal(self.read(table, row, min(ROWS, rows - row)), self.read(head, row, min(ROWS, rows - row)))
            for row in range(0, rows, ROWS)
        )
        if not same:
            raise UserError(
                f"{self._folder} has an lm_head.weight unlike its embedding, and config.json says that they are one: "
                "set share_input_output_layers to false there, or remove the tensor"
            )

    def dtypes(self) -> set[torch.dtype]:
        """What the matrices are stored in; those that quantised ones stand for are in."""
        matrices = [name for name, shape in self.shapes.items() if len(shape) > 1]
        plain = {FLOATS[self._pieces[name][0].kind] for name in matrices if name not in self._packings}
        return plain | ({self.quantized_dtype} if self.quantized_dtype else set())

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows ``first_row`` to ``first_row + rows`` (default: to the end) of a tensor, on the CPU."""
        if name not in self.shapes:
            raise UserError(f"{self._folder} holds no tensor {name}")
        if (packing := self._packings.get(name)) is None:
            return self._read(name, first_row, rows)
        weight, scales, biases = (self._read(part, first_row, rows) for part in _triple(name))
        return dequantize(Quantized(weight, scales, biases, packing.bits, packing.group_size))

    def raw(self, name: str) -> Tensor | Quantized:
        """A whole tensor as it is stored. One that is not cut stands on the file's own pages: do not write to it."""

        def whole(part: str) -> Tensor:
            pieces = self._pieces[part]
            return self._mapped(pieces[0]) if len(pieces) == 1 else self._read(part, 0, None)

        if (packing := self._packings.get(name)) is None:
            return whole(name)
        weight, scales, biases = map(whole, _triple(name))
        return Quantized(weight, scales, biases, packing.bits, packing.group_size)

    def _read(self, name: str, first_row: int, rows: int | None) -> Tensor:
        """The same for a tensor as it is stored."""
        shape, pieces = self._pieces[name][0].whole, self._pieces[name]
        if not shape:
            return self._mapped(pieces[0]).clone()
        last_row = shape[0] if rows is None else first_row + rows
        assert 0 <= first_row <= last_row <= shape[0], f"{name}: rows {first_row} to {last_row} of {shape}"
        parts = [
            self._mapped(p)[max(first_row - p.first_row, 0) : last_row - p.first_row]
            for p in pieces
            if p.first_row < last_row and first_row < p.first_row + p.rows
        ] or [self._mapped(pieces[0])[:0]]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def copy(self, name: str, target: Tensor) -> None:
        """Fill ``target``, of the tensor's whole shape and any dtype and device."""
        if name in self._packings:
            target.copy_(self.read(name))
            return
        for piece in self._pieces[name]:
            place = target[piece.first_row : piece.first_row + piece.rows] if target.dim() else target
            place.copy_(self._mapped(piece))

    def _unite(self, base: str, packing: Packing) -> None:
        """Make one tensor of a quantised matrix, its scales and its biases; UserError where they do not fit."""
        weight, scales, biases = _triple(f"{base}.weight")
        place = f"{self._pieces[scales][0].file}: {self._pieces[scales][0].stored}"
        for part in (weight, biases):
            if part not in self.shapes:
                raise UserError(f"{place} stands without its {part.rpartition('.')[2]}: the folder is not complete")
        kinds = [self._pieces[part][0].kind for part in (weight, scales, biases)]
        if kinds[0] != "U32" or kinds[1] not in FLOATS or kinds[1] != kinds[2]:
            raise UserError(
                f"{place}: weight, scales and biases are of {', '.join(kinds)}: they must be U32 and twice the same of "
                + ", ".join(FLOATS)
            )
        shapes = [self.shapes.pop(part) for part in (weight, scales, biases)]
        rows, groups = (*shapes[1], 0, 0)[:2]
        columns = groups * packing.group_size
        expected = [(rows, packed_columns(columns, packing.bits)), (rows, groups), (rows, groups)]
        if shapes != expected:
            raise UserError(
                f"{place}: weight, scales and biases have shapes {', '.join(map(str, shapes))}, but {packing.bits} "
                f"bits in groups of {packing.group_size}, as config.json says, give {', '.join(map(str, expected))}"
            )
        self.shapes[weight] = (rows, columns)
        self._packings[weight] = packing

    def _mapped(self, piece: _Piece) -> Tensor:
        """A piece as the file's own pages: nothing is read before it is used, and it must not outlive the file."""
        try:
            full = piece.file not in self._opened and len(self._opened) >= OPEN_FILES
            if full or self._read_bytes >= OPEN_BYTES:
                self._opened.clear()
                self._read_bytes = 0
            if piece.file not in self._opened:
                self._opened[piece.file] = safe_open(piece.file, framework="pt")
            tensor: Tensor = self._opened[piece.file].get_tensor(piece.stored)
            self._read_bytes += tensor.nbytes
            return tensor
        except (SafetensorError, OSError) as error:
            raise _unreadable(piece.file, error) from error

    def _add(self, file: Path, rename: Callable[[str], str]) -> None:
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                found = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}
                places = json.loads((tensors.metadata() or {}).get(PLACES, "{}"))
            for stored, (shape, kind) in found.items():
                first_row, whole = places.get(stored, (0, shape))
                if len(whole) != len(shape) or tuple(whole[1:]) != shape[1:]:
                    raise ValueError(f"{stored} is of shape {shape} and said to be a part of {whole}")
                name = rename(stored)
                if self.shapes.setdefault(name, tuple(whole)) != tuple(whole):
                    raise ValueError(f"{stored} is part of {whole} here, and of {self.shapes[name]} in another file")
                piece = _Piece(file, stored, kind, int(first_row), shape[0] if shape else 1, tuple(whole))
                self._pieces.setdefault(name, []).append(piece)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _unreadable(file, error) from error


def _triple(name: str) -> tuple[str, str, str]:
    """The tensors that a quantised matrix NAME.weight is made of."""
    base = name.removesuffix(".weight")
    return name, f"{base}.scales", f"{base}.biases"


def safetensors_files(folder: Path, stem: str) -> list[Path]:
    """The files of a folder's index, or STEM.safetensors, or all parts STEM-00001-of-00004.safetensors.

    Raises UserError naming the first that is missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
    parts = sorted(folder.glob(f"{stem}-?????-of-?????.safetensors"))
    if index.is_file():
        files = [folder / name for name in _indexed(index)]
    elif parts and not (folder / f"{stem}.safetensors").is_file():
        total = parts[-1].stem[-5:]
        numbers = range(1, int(total) + 1) if total.isdecimal() else []
        files = [folder / f"{stem}-{number:05}-of-{total}.safetensors" for number in numbers]
        if strange := set(parts) - set(files):
            raise UserError(f"{min(strange)} is not one of {total} parts: remove it, or take another folder")
    else:
        files = [folder / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}")
    return files


def _indexed(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(map(os.fspath, weight_map.values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of tensors ({error!r})") from error
    if not names:
        raise UserError(f"{index} names no file: it is no index of tensors")
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} points outside the folder ({name!r}): refused")
    return names


def _check_rows(pieces: list[_Piece], shape: tuple[int, ...]) -> None:
    """Every row of a whole tensor must stand in exactly one piece; they come sorted."""
    row = 0
    for piece in pieces:
        if piece.first_row != row:
            what = "rows of it are missing before that" if piece.first_row > row else "these stand elsewhere too"
            raise UserError(f"{piece.file} holds {piece.stored} from row {piece.first_row} on, and {what}: refused")
        row += piece.rows
    if row != (shape[0] if shape else 1):
        last = pieces[-1]
        raise UserError(f"{last.file.parent} holds {row} of the {shape[0]} rows of {last.stored}: a part is missing")


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read as safetensors ({error}): it is damaged or cut short")
