"""Model folder <-> model: config.json and safetensors in the layout of the published OpenELM folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openelm.errors import UserError
from openelm.files import whole_folder
from openelm.model.geometry import ModelConfig
from openelm.model.safetensors_file import Entry, write_shards
from openelm.model.transformer import OpenELM

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLACES = "openelm.rows"  # in a file's metadata: JSON of {tensor: [first row, shape of the whole]}
OPEN_FILES = 16  # that a reader keeps open


class Tokenizer(Protocol):
    """What a folder needs of a tokenizer: that it can write itself."""

    def save(self, folder: Path) -> None: ...


def save_model(
    model: OpenELM,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    card: str = "",
    overwrite: bool = False,
) -> Path:
    """Write ``model`` as a folder that transformers, mlx-lm and llama.cpp's converter read.

    ``dtype`` casts the weights (default: as they are); ``card`` is the text of README.md. Raises UserError where the
    folder exists and ``overwrite`` is off.
    """
    dtype = dtype or model.token_embeddings.weight.dtype
    with whole_folder(Path(folder), overwrite=overwrite) as draft:
        write_model(draft, model.config, model.state_dict().__getitem__, dtype)
        if tokenizer is not None:
            tokenizer.save(draft)
        if card:
            (draft / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def write_model(folder: Path, config: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and the tensors into a folder that is there already.

    ``read`` gives a tensor by its name inside the package; each is asked for once, when the one before is written.
    """
    write_config(folder, config, dtype)
    shapes = tensor_shapes(config)
    entries = [Entry(to_folder_name(name), shape, dtype) for name, shape in shapes.items()]
    write_shards(folder, entries, map(read, shapes), SHARD_BYTES, {"format": "pt"})


@cache
def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, in its order: name inside the package -> shape. A shared embedding stands once."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in OpenELM(config).state_dict().items()}


def write_config(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json."""
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(folder / "config.json", config_to_folder(config, dtype))
    _write_json(folder / "generation_config.json", ends)


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> OpenELM:
    """The model of a folder, in evaluation mode; ``dtype`` defaults to the one that config.json states.

    Raises UserError for missing files, missing, unknown or misshapen tensors, each by name.
    """
    folder = Path(folder)
    config, stored = load_config(folder)
    with torch.device("meta"):
        model = OpenELM(config)
    model = model.to(dtype or stored).to_empty(device=device)
    copy_tensors(folder, dict(model.state_dict()))
    return model.eval().requires_grad_(False)


def load_config(folder: Path) -> tuple[ModelConfig, torch.dtype]:
    """Geometry and dtype that a folder's config.json states."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object with the model's keys")
    if data.get("model_type") != "openelm":
        raise UserError(f"{path} says model_type {data.get('model_type')!r}: only 'openelm' can be read")
    name = data.get("dtype") or data.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise UserError(f"{path} says dtype {name!r}: it must be one of {', '.join(DTYPES)}")
    known = {f.name for f in fields(ModelConfig)}
    for key in ("model_dim", "num_transformer_layers"):
        if key not in data:
            raise UserError(f"{path} lacks {key}, without which there is no model")
    try:
        return ModelConfig(**{k: v for k, v in data.items() if k in known}), DTYPES[name]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def copy_tensors(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill ``targets`` (by their names inside the package) from a folder's safetensors, one tensor at a time."""
    stored = open_tensors(folder)
    stored.check({name: tuple(target.shape) for name, target in targets.items()})
    for name, target in targets.items():
        stored.copy(name, target)


def open_tensors(folder: Path) -> StoredTensors:
    """The tensors of a folder, by their names inside the package."""
    return StoredTensors(safetensors_files(folder, "model"), from_folder_name)


def config_to_folder(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of config.json; multipliers are written expanded, as other engines recompute the widths from them."""
    return {
        **config.as_dict(),
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "ffn_multipliers": list(config.betas),
        "tie_word_embeddings": config.share_input_output_layers,
        "dtype": next(name for name, value in DTYPES.items() if value == dtype),
        "use_cache": True,
    }


def to_folder_name(name: str) -> str:
    """A tensor's name in the folder (Hugging Face's) from the one inside the package (CoreNet's)."""
    return "lm_head.weight" if name == "classifier.weight" else f"transformer.{name}"


def from_folder_name(name: str) -> str:
    """The other way round."""
    return "classifier.weight" if name == "lm_head.weight" else name.removeprefix("transformer.")


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
    first_row: int
    rows: int


class StoredTensors:
    """The tensors of safetensors files, whole or cut by rows over several; only what is asked for is read.

    ``rename`` gives the name to ask by from the one in the file. Raises UserError where a file is damaged, or where the
    rows of a tensor are not all there exactly once.
    """

    def __init__(self, files: list[Path], rename: Callable[[str], str] = str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder = files[0].parent
        self._pieces: dict[str, list[_Piece]] = {}
        self._opened: dict[Path, Any] = {}
        for file in files:
            self._add(file, rename)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: (piece.first_row, piece.rows))
            _check_rows(pieces, self.shapes[name])

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError where these are not the tensors of a model with ``shapes``, naming the first that differs."""
        for name, found in self.shapes.items():
            piece = self._pieces[name][0]
            if name == "classifier.weight" and name not in shapes:
                continue  # some tools write the shared embedding twice
            if name not in shapes:
                raise UserError(f"{piece.file} holds {piece.stored}, which a model of this config.json does not have")
            if found != shapes[name]:
                raise UserError(f"{piece.file}: {piece.stored} has shape {found}, but config.json gives {shapes[name]}")
        if missing := shapes.keys() - self.shapes.keys():
            first = to_folder_name(min(missing))
            raise UserError(f"{self._folder} lacks {len(missing)} tensors, the first of them {first}")

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows ``first_row`` to ``first_row + rows`` (default: to the end) of a tensor, on the CPU."""
        if name not in self.shapes:
            raise UserError(f"{self._folder} holds no tensor {name}")
        shape, pieces = self.shapes[name], self._pieces[name]
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
        for piece in self._pieces[name]:
            place = target[piece.first_row : piece.first_row + piece.rows] if target.dim() else target
            place.copy_(self._mapped(piece))

    def _mapped(self, piece: _Piece) -> Tensor:
        """A piece as the file's own pages: nothing is read before it is used, and it must not outlive the file."""
        try:
            if piece.file not in self._opened:
                if len(self._opened) >= OPEN_FILES:
                    self._opened.clear()
                self._opened[piece.file] = safe_open(piece.file, framework="pt")
            tensor: Tensor = self._opened[piece.file].get_tensor(piece.stored)
            return tensor
        except (SafetensorError, OSError) as error:
            raise _unreadable(piece.file, error) from error

    def _add(self, file: Path, rename: Callable[[str], str]) -> None:
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
                places = json.loads((tensors.metadata() or {}).get(PLACES, "{}"))
            for stored, shape in found.items():
                first_row, whole = places.get(stored, (0, shape))
                if len(whole) != len(shape) or tuple(whole[1:]) != shape[1:]:
                    raise ValueError(f"{stored} is of shape {shape} and said to be a part of {whole}")
                name = rename(stored)
                if self.shapes.setdefault(name, tuple(whole)) != tuple(whole):
                    raise ValueError(f"{stored} is part of {whole} here, and of {self.shapes[name]} in another file")
                piece = _Piece(file, stored, int(first_row), shape[0] if shape else 1)
                self._pieces.setdefault(name, []).append(piece)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise _unreadable(file, error) from error


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of tensors ({error!r})") from error
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


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
