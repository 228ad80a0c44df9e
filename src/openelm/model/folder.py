"""Model folder <-> model: config.json and safetensors in the layout of the published OpenELM folders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.files import whole_folder
from openelm.model.geometry import ModelConfig
from openelm.model.quantize import BITS, GROUP_SIZES
from openelm.model.safetensors_file import Entry, write_shards
from openelm.model.stored import Packing, StoredTensors, from_folder_name, safetensors_files, to_folder_name
from openelm.model.transformer import OpenELM

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def write_config(folder: Path, config: ModelConfig, dtype: torch.dtype, more: Mapping[str, Any] | None = None) -> None:
    """Write config.json, with further keys where there are ``more``, and generation_config.json."""
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(folder / "config.json", {**config_to_folder(config, dtype), **(more or {})})
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


def find_model_folder(path: Path) -> Path:
    """``path`` itself where it is a model folder, ``path/model`` where it is a run folder; UserError otherwise."""
    for folder in (path, path / "model"):
        refuse_adapter(folder)
        if (folder / "config.json").is_file():
            return folder
    reason = "has no config.json, and no model/ with one" if path.is_dir() else "is not a folder"
    raise UserError(f"{path} {reason}: give a model folder, or a run folder whose model/ is written")


def refuse_adapter(folder: Path) -> None:
    """UserError where a folder holds an adapter and no model, with the command that makes one of it."""
    file = folder / "adapter_config.json"
    if not file.is_file() or any(folder.glob("model*.safetensors")):  # a whole model may have an adapter beside it
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    command = shlex.join(["openelm", "merge", base if isinstance(base, str) and base else "MODEL", str(folder), "OUT"])
    raise UserError(f"{folder} is an adapter, and no model by itself: make one with `{command}`, and give OUT")


def load_config(folder: Path) -> tuple[ModelConfig, torch.dtype]:
    """Geometry and dtype that a folder's config.json states.

    Without a dtype it is float32, or that of the scales where the matrices are quantised.
    """
    path, data = folder / "config.json", _read_config(folder)
    if data.get("model_type") != "openelm":
        raise UserError(f"{path} says model_type {data.get('model_type')!r}: only 'openelm' can be read")
    name = data.get("dtype") or data.get("torch_dtype")
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise UserError(f"{path} says dtype {name!r}: it must be one of {', '.join(DTYPES)}")
    if (data.get("rope_scaling") or {}).get("rope_type", "default") != "default":
        raise UserError(f"{path} says rope_scaling {data['rope_scaling']!r}: only unscaled positions are built")
    if data.get("tie_word_embeddings") is False:
        # Other tools' word for it; untied as soon as one of the two says so, as a head must not be passed over.
        data["share_input_output_layers"] = False
    known = {f.name for f in fields(ModelConfig)}
    for key in ("model_dim", "num_transformer_layers"):
        if key not in data:
            raise UserError(f"{path} lacks {key}, without which there is no model")
    try:
        config = ModelConfig(**{k: v for k, v in data.items() if k in known})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if name is not None:
        return config, DTYPES[name]
    quantized = open_tensors(folder).quantized_dtype if "quantization" in data else None
    return config, quantized or torch.float32


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object with the model's keys")
    return data


def copy_tensors(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill ``targets`` (by their names inside the package) from a folder's safetensors, one tensor at a time."""
    stored = open_tensors(folder)
    stored.check({name: tuple(target.shape) for name, target in targets.items()})
    for name, target in targets.items():
        stored.copy(name, target)


def open_tensors(folder: Path) -> StoredTensors:
    """The tensors of a folder, by their names inside the package; quantised matrices as what they stand for."""
    packing = _packings(folder / "config.json", _read_config(folder))
    return StoredTensors(safetensors_files(folder, "model"), from_folder_name, packing)


def _packings(path: Path, data: dict[str, Any]) -> Callable[[str], Packing | None]:
    """How the matrix of a module is quantised, as config.json says: its own entry, or else what holds for all."""
    entries = data.get("quantization")
    if entries is None:
        if other := data.get("quantization_config"):
            raise UserError(
                f"{path}: weights quantised as {other!r} cannot be read: take a folder that is not quantised"
            )
        return lambda _: None
    if not isinstance(entries, dict):
        raise UserError(f"{path} says quantization {entries!r}: it must be an object with bits and group_size")
    default = _packing(path, "quantization", entries)
    own = {
        name: default if entry is True else _packing(path, f"quantization of {name}", entry) if entry else None
        for name, entry in entries.items()
        if isinstance(entry, dict | bool)
    }
    return lambda name: own.get(name, default)


def _packing(path: Path, what: str, entry: dict[str, Any]) -> Packing:
    bits, group_size, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
    whole = all(type(number) is int for number in (bits, group_size))
    if not whole or bits not in BITS or group_size not in GROUP_SIZES or mode != "affine":
        raise UserError(
            f"{path} says for {what}: bits {bits!r}, group_size {group_size!r}, mode {mode!r}: only 4 or 8 bits, "
            "groups of 32, 64 or 128 and mode 'affine' can be read"
        )
    return Packing(bits, group_size)


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


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
