"""Model folder <-> model: config.json and safetensors in the layout of the published OpenELM folders."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openelm.errors import UserError
from openelm.files import whole_folder
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX = "model.safetensors.index.json"


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
        write_model(draft, model.config, model.state_dict(), dtype)
        if tokenizer is not None:
            tokenizer.save(draft)
        if card:
            (draft / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def write_model(folder: Path, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and the tensors into a folder that is there already.

    ``weights`` go by their names inside the package.
    """
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(folder / "config.json", config_to_folder(config, dtype))
    _write_json(folder / "generation_config.json", ends)
    _write_tensors(folder, {to_folder_name(name): tensor for name, tensor in weights.items()}, dtype)


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
    missing = set(targets)
    for file in _tensor_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 (not a dict)
                    name = from_folder_name(stored)
                    if name == "classifier.weight" and name not in targets:
                        continue  # some tools write the shared embedding twice
                    if name not in targets:
                        raise UserError(f"{file} holds {stored}, which a model of this config.json does not have")
                    source, target = tensors.get_tensor(stored), targets[name]
                    if source.shape != target.shape:
                        raise UserError(
                            f"{file}: {stored} has shape {tuple(source.shape)}, but config.json gives "
                            f"{tuple(target.shape)}"
                        )
                    target.copy_(source)
                    missing.discard(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors ({error}): it is damaged or cut short") from error
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} tensors, the first of them {to_folder_name(min(missing))}")


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


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(map(os.fspath, weight_map.values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is not an index of tensors ({error!r})") from error
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{folder / INDEX} points outside the folder ({name!r}): refused")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}")
    return files


def _write_tensors(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        tensor_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor_bytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        cast = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in shard.items()}
        save_file(cast, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(t.numel() * dtype.itemsize for t in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
