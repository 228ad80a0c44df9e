"""CoreNet's checkpoints as a source and as a target: plain weights, averages, training states, LoRA and DoRA.

Shapes: V vocabulary, D model_dim, R rank of an adapter.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import Tensor

from openelm.errors import UserError
from openelm.interop.corenet_state import GEOMETRY_KEY, contents
from openelm.interop.source import Source, geometry_of, widest
from openelm.interop.target import Format, Target
from openelm.interop.verify import reference_logits
from openelm.model.folder import tensor_shapes
from openelm.model.geometry import ModelConfig

# The models that CoreNet's table has beside the four of the paper.
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "gpt-1_3B": dict(model_dim=2048, num_transformer_layers=24, head_dim=64, qkv_multipliers=1.0, ffn_multipliers=3.0),
    "gpt-test": dict(
        model_dim=128,
        num_transformer_layers=1,
        head_dim=64,
        num_gqa_groups=1,
        qkv_multipliers=(0.25, 0.5),
        ffn_multipliers=(0.25, 0.75),
    ),
}
ADAPTER = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.[^.]+(?:\.weight)?")
EMBEDDING, OUTPUT = "token_embeddings.weight", "classifier.weight"
STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}
ALIGNMENT = 64  # of each tensor's bytes in the file, as PyTorch has it


def open_checkpoint(path: Path, geometry: Path | None = None) -> Source:
    """A .pt file of CoreNet, or of ours; ``geometry`` is CoreNet's YAML, without which shapes tell the geometry.

    UserError: the file would run code, is damaged, or holds no OpenELM; the YAML lacks keys, or disagrees.
    """
    origin = str(path)
    found = contents(path)
    recipe = read_recipe(geometry) if geometry is not None else None
    notes = []
    if found.training is not None:
        notes.append(f"{origin} is a training state: its optimizer was left behind")
        if "ema_state_dict" in found.training:
            notes[-1] += ", and so was its exponential average, which CoreNet writes to checkpoint_ema_*.pt too"
    weights = merged(found.weights, recipe, origin, notes)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if recipe is not None:
        untied = OUTPUT in weights and OUTPUT not in found.weights  # by an adapter
        config = recipe.config.changed(share_input_output_layers=not untied)
    elif found.geometry is not None:
        config = _own_geometry(found.geometry, origin)
    else:
        config = geometry_of(shapes, origin)
    check_shapes(shapes, config, origin, "the YAML's geometry" if recipe else "the geometry")

    def read(name: str) -> Tensor:
        weight = weights[name]
        return weight.matrix() if isinstance(weight, Adapted) else weight

    dtype = widest(weight.dtype for weight in weights.values() if len(weight.shape) > 1)
    return Source(origin=origin, config=config, dtype=dtype, read=read, notes=tuple(notes))


def check_shapes(shapes: dict[str, tuple[int, ...]], config: ModelConfig, origin: str, geometry: str) -> None:
    """UserError where these are not the tensors of the geometry, naming the first that differs."""
    expected = tensor_shapes(config)
    for name, shape in shapes.items():
        if name not in expected:
            raise UserError(f"{origin} holds {name}, which {geometry} does not have")
        if shape != expected[name]:
            raise UserError(f"{origin}: {name} has shape {shape}, but {geometry} gives {expected[name]}")
    if missing := [name for name in expected if name not in shapes]:
        raise UserError(f"{origin} lacks {len(missing)} tensors of {geometry}, the first of them {missing[0]}")


def _own_geometry(stated: dict[str, Any], origin: str) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    try:
        return ModelConfig(**{key: value for key, value in stated.items() if key in known})
    except (UserError, TypeError) as error:
        raise UserError(f"{origin} states a geometry that is none ({error}): it is damaged") from error


@dataclass(frozen=True)
class Recipe:
    """What CoreNet's YAML says about a model: its geometry, and (regex, rank, scale) of its adapters."""

    config: ModelConfig
    adapters: tuple[tuple[str, int, float], ...]


def read_recipe(file: Path) -> Recipe:
    """CoreNet's YAML; UserError names the key that is missing or cannot be."""
    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        given = model["language_modeling"]["general_gpt"]
        name, sizes = given["model_name"], {key: given[key] for key in ("vocab_size", "max_context_length")}
        listed = (model.get("lora") or {}).get("config") or []
        adapters = tuple((entry["regex"], entry["params"]["r"], _scale(entry["params"])) for entry in listed)
        for regex, _, _ in adapters:
            re.compile(regex)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give CoreNet's YAML of the model") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, re.error) as error:
        raise UserError(f"{file} cannot be read as YAML ({' '.join(str(error).split())[:200]})") from error
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        key = f"lacks {error.args[0]}" if isinstance(error, KeyError) else f"does not have the form of one ({error})"
        raise UserError(
            f"{file} is no configuration of a CoreNet language model: it {key}; model.language_modeling.general_gpt "
            "needs model_name, vocab_size and max_context_length"
        ) from error
    try:
        if name in OTHER_MODELS:
            return Recipe(ModelConfig(**OTHER_MODELS[name], **sizes), adapters)
        return Recipe(ModelConfig.from_name(str(name).replace("_", "."), **sizes), adapters)
    except UserError as error:
        raise UserError(f"{file}: model_name {name!r} with {sizes}: {error}") from error


def _scale(params: dict[str, Any]) -> float:
    """What an adapter's product is multiplied with."""
    rank, alpha = params["r"], params["lora_alpha"]
    return float(alpha / (rank**0.5 if params.get("use_rslora") else rank))


@dataclass(frozen=True)
class Adapted:
    """A matrix with its LoRA, W + scale * up @ down; with a magnitude its DoRA, whose rows are as long as that says."""

    base: Tensor
    up: Tensor  # (rows, R)
    down: Tensor  # (R, columns)
    scale: float
    magnitude: Tensor | None = None  # (rows)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @cached_property
    def changes_nothing(self) -> bool:
        """Whether the adapter is as it was made: one of its factors is zero."""
        return self.magnitude is None and not (self.up.any() and self.down.any())

    def matrix(self) -> Tensor:
        """The plain matrix, in fp32."""
        whole = torch.addmm(self.base.float(), self.up.float(), self.down.float(), alpha=self.scale)
        if self.magnitude is not None:
            whole *= (self.magnitude.float() / torch.linalg.vector_norm(whole, dim=1))[:, None]
        return whole


def merged(
    weights: dict[str, Tensor], recipe: Recipe | None, origin: str, notes: list[str]
) -> dict[str, Tensor | Adapted]:
    """Weights by their plain names, adapters beside what they adapt; what there is to say is added to ``notes``."""
    plain: dict[str, Tensor | Adapted] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if match := ADAPTER.fullmatch(name):
            layer, part = match.groups()
            if parts.setdefault(layer, {}).setdefault(part, tensor) is not tensor:
                raise UserError(f"{origin} holds several adapters of {layer}: only one can be merged; keep one")
            continue
        short = name.removesuffix(".base_layer.weight") + ".weight" if name.endswith(".base_layer.weight") else name
        if short in plain:
            raise UserError(f"{origin} holds {short} twice, once as the base of an adapter")
        plain[short] = tensor
    for layer, found in parts.items():
        base = plain.get(f"{layer}.weight")
        if not isinstance(base, Tensor):
            raise UserError(f"{origin} holds an adapter of {layer} without {layer} itself: give the file that has both")
        plain[f"{layer}.weight"] = _adapted(layer, base, found, recipe, origin)
    output, embedding = plain.get(OUTPUT), plain.get(EMBEDDING)
    if isinstance(output, Tensor) and isinstance(embedding, Tensor) and _same(output, embedding):
        del plain[OUTPUT]
    if isinstance(embedding, Adapted) and output is None and not embedding.changes_nothing:
        # CoreNet's output layer reads the weight beneath the adapter.
        plain[OUTPUT] = embedding.base
        notes.append(
            "the adapter of the embedding acts on the input only, as in CoreNet: the output layer, shared before, "
            "became a matrix of its own"
        )
    if parts:
        rule = (
            "" if recipe and recipe.adapters else ", with lora_alpha / r taken to be 1, as CoreNet's own YAMLs have it"
        )
        notes.append(f"the adapters of {len(parts)} matrices were merged{rule}")
    return plain


def _adapted(layer: str, base: Tensor, parts: dict[str, Tensor], recipe: Recipe | None, origin: str) -> Adapted:
    kinds = parts.keys() - {"magnitude_vector"}
    if kinds == {"A", "B"}:
        up, down = parts["B"], parts["A"]
    elif kinds == {"embedding_A", "embedding_B"} and len(parts) == 2:
        up, down = parts["embedding_A"].T, parts["embedding_B"].T  # (V, R) and (R, D)
    else:
        raise UserError(f"{origin}: the adapter of {layer} has {', '.join(sorted(parts))}: it is not whole")
    magnitude = parts.get("magnitude_vector")
    rank = down.shape[0] if down.dim() == 2 else 0
    fits = base.dim() == 2 and up.shape == (base.shape[0], rank) and down.shape == (rank, base.shape[1])
    if not rank or not fits or (magnitude is not None and magnitude.shape != base.shape[:1]):
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
        raise UserError(f"{origin}: the adapter of {layer} ({shapes}) does not fit its matrix {tuple(base.shape)}")
    return Adapted(base, up, down, _scale_of(layer, rank, recipe, origin), magnitude)


def _scale_of(layer: str, rank: int, recipe: Recipe | None, origin: str) -> float:
    if recipe is None or not recipe.adapters:
        return 1.0
    for regex, stated, scale in recipe.adapters:
        if re.match(regex, layer):
            if stated != rank:
                raise UserError(f"{origin}: the adapter of {layer} has rank {rank}, but the YAML says r: {stated}")
            return scale
    raise UserError(f"{origin} has an adapter of {layer}, which no regex in the YAML's model.lora.config fits")


def _same(one: Tensor, other: Tensor) -> bool:
    """The same memory, or the same values: some tools write a shared matrix twice."""
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


class _Storage:
    """A tensor's bytes that are going to be written."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.reference = ("storage", STORAGES[dtype], key, "cpu", numel)


class _Planned:
    """A tensor that is going to be written: pickles as one."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        strides = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> tuple[Any, ...] | None:
        return thing.reference if isinstance(thing, _Storage) else None


def check(source: Source, form: Format) -> None:
    """CoreNet computes in what its weights are in: it knows no quantisation."""
    if form.quantize:
        raise UserError(f"CoreNet has no quantised models: leave out --quantize {form.quantize}")


def write(file: Path, source: Source, form: Format) -> None:
    """Write a state dict under CoreNet's names as torch.save would, one tensor in memory at a time.

    Where PyTorch keeps the versions of a state dict's modules, the geometry stands too: CoreNet looks past it.
    """
    planned: OrderedDict[str, _Planned] = OrderedDict()
    for key, (name, shape) in enumerate(source.shapes.items()):
        planned[name] = _Planned(_Storage(str(key), form.dtype, torch.Size(shape).numel()), shape)
    planned._metadata = {"": {"version": 1, GEOMETRY_KEY: source.config.as_dict()}}  # type: ignore[attr-defined]
    pickled = BytesIO()
    _Pickler(pickled, protocol=2).dump(planned)
    with file.open("wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
        _record(raw, archive, "data.pkl", pickled.getbuffer())
        _record(raw, archive, "byteorder", sys.byteorder.encode())
        for key, name in enumerate(source.shapes):
            tensor = source.weight(name).detach().to("cpu", form.dtype).contiguous()
            _record(raw, archive, f"data/{key}", tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next is read
        _record(raw, archive, "version", b"3\n")


def _record(raw: BinaryIO, archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """One entry, its bytes at a multiple of ALIGNMENT, so that a mapped file gives aligned tensors."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = len(content)
    header_bytes, zip64_bytes, padding_header_bytes = 30, 20, 4
    start = raw.tell() + header_bytes + len(entry.filename) + zip64_bytes + padding_header_bytes
    padding = -start % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as record:
        record.write(content)


def logits(file: Path, rows: list[list[int]]) -> Tensor:
    """(B, T, V) logits of the file, read back and computed by our own model: CoreNet is not on any package index."""
    return reference_logits(open_checkpoint(file), torch.tensor(rows))


TARGET = Target("our reader of CoreNet's files", True, check, write, open_checkpoint, logits)
