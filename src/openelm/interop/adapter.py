"""Adapters as files: PEFT's names, adapter_config.json and adapter_model.safetensors, without the peft package.

An adapter adds to the matrix of each module that it targets the product of two thin ones, B @ A; DoRA also trains the
length of each row of the sum. Names inside the package are those that peft gives the parameters of our model; in the
files they begin with the path of the exported model for transformers, so that its PeftModel reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.model.folder import tensor_shapes
from openelm.model.geometry import ModelConfig
from openelm.model.safetensors_file import Entry, write_file
from openelm.model.stored import FLOATS, StoredTensors, safetensors_files

Kind = Literal["lora", "dora", "rslora"]
EMBEDDING = "token_embeddings"
PAPER_TARGETS = (EMBEDDING, "qkv_proj", "out_proj", "proj_1", "proj_2")
ATTENTION_TARGETS = ("qkv_proj", "out_proj")

CONFIG, STEM = "adapter_config.json", "adapter_model"
PREFIX, TRANSFORMER = "base_model.model.", "transformer."
# What adapter_config.json may say and we read, or what changes nothing of an adapter that is trained already.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights")
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
INDIFFERENT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "runtime_config", "eva_config", "loftq_config", "corda_config"),
    *("lora_ga_config", "ephemeral_gpu_offload"),
)
NEUTRAL: tuple[Any, ...] = (None, False, "", "none", [], {})
# Others begin by changing the model's own weights, and what they saved belongs to those.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """What is added to a model. ``targets`` are names of modules, or what these end with behind a dot.

    Raises UserError with every problem found.
    """

    kind: Kind = "lora"
    r: int = 32
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION_TARGETS

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in get_args(Kind):
            problems.append(f"kind={self.kind!r} must be one of {', '.join(get_args(Kind))}")
        if type(self.r) is not int or self.r < 1:
            problems.append(f"r={self.r!r} must be a whole number of at least 1")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            problems.append(f"alpha={self.alpha!r} must be a positive number")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r} must be at least 0 and less than 1")
        if not self.targets or not all(isinstance(target, str) and target for target in self.targets):
            problems.append(f"targets={self.targets!r} must name modules, such as {', '.join(ATTENTION_TARGETS)}")
        if problems:
            raise UserError("adapter: " + "; ".join(problems))

    @property
    def scaling(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.kind == "rslora" else self.r)


def modules(adapter: Adapter, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The modules that an adapter changes, in the model's order: name -> shape of the matrix, (rows, columns)."""
    matrices = _matrices(config)
    return {name: matrices[name] for name in matrices if any(_matches(target, name) for target in adapter.targets)}


def checked(adapter: Adapter, config: ModelConfig) -> Adapter:
    """The adapter; UserError where a target matches no module of the model."""
    names = list(_matrices(config))
    for target in adapter.targets:
        if target in ("classifier", "lm_head"):
            raise UserError(
                f"adapter.targets: {target} is the output layer, which is not adapted here: leave it out; there are "
                f"{', '.join(PAPER_TARGETS)}"
            )
        if not any(_matches(target, name) for name in names):
            raise UserError(
                f"adapter.targets: {target} matches no module of this model: take from {', '.join(PAPER_TARGETS)}, or "
                f"single ones from {names[1]} to {names[-1]}"
            )
    return adapter


def changes_output(adapter: Adapter, config: ModelConfig) -> bool:
    """Whether the adapter is on a matrix that is embedding and output layer in one: merged, it changes both."""
    return config.share_input_output_layers and EMBEDDING in modules(adapter, config)


def shapes(adapter: Adapter, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name inside the package -> shape of each tensor of an adapter, in the order of the adapted model's parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in modules(adapter, config).items():
        # peft takes an embedding for a projection from ids, so its matrix is the transpose of what is stored.
        into, out = (rows, columns) if name == EMBEDDING else (columns, rows)
        a, b, magnitude = parts(name)
        found |= {a: (adapter.r, into), b: (out, adapter.r)}
        if adapter.kind == "dora":
            found[magnitude] = (out,)
    return found


def parts(module: str) -> tuple[str, str, str]:
    """Names inside the package of A, B and DoRA's magnitude of a module."""
    if module == EMBEDDING:
        a, b = f"{module}.lora_embedding_A.default", f"{module}.lora_embedding_B.default"
    else:
        a, b = f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"
    return a, b, f"{module}.lora_magnitude_vector.default.weight"


def to_file_name(name: str) -> str:
    """A tensor's name in an adapter's file from the one inside the package."""
    name = name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
    return PREFIX + TRANSFORMER + name.replace(".default", "", 1)


def from_file_name(name: str) -> str:
    """The other way round; of adapters of a bare model too, whose names lack ``transformer.``."""
    name = name.removeprefix(PREFIX).removeprefix(TRANSFORMER)
    module, _, last = name.rpartition(".")
    if last == "lora_magnitude_vector":
        return f"{name}.default.weight"
    if last in ("lora_embedding_A", "lora_embedding_B"):
        return f"{name}.default"
    return f"{module}.default.{last}" if module.endswith((".lora_A", ".lora_B")) else name


def adapter_config(adapter: Adapter, base: str) -> dict[str, Any]:
    """The keys of adapter_config.json; ``base`` is the path or Hub id of the model that the adapter belongs to."""
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.kind == "dora",
        "use_rslora": adapter.kind == "rslora",
    }


def write_adapter(
    folder: Path, adapter: Adapter, config: ModelConfig, read: Callable[[str], Tensor], base: str, card: str
) -> None:
    """Write an adapter into a folder that is there: its config, its tensors in fp32, and ``card`` as README.md.

    ``read`` gives a tensor by its name inside the package; each is asked for once, when the one before is written.
    """
    write_config(folder, adapter, base)
    write_tensors(folder, adapter, config, read)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_config(folder: Path, adapter: Adapter, base: str) -> None:
    """Write adapter_config.json."""
    text = json.dumps(adapter_config(adapter, base), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def write_tensors(folder: Path, adapter: Adapter, config: ModelConfig, read: Callable[[str], Tensor]) -> None:
    """Write adapter_model.safetensors."""
    found = shapes(adapter, config)
    entries = [Entry(to_file_name(name), shape, torch.float32) for name, shape in found.items()]
    write_file(folder / f"{STEM}.safetensors", entries, map(read, found), {"format": "pt"})


def find_adapter_folder(path: Path) -> Path:
    """``path`` itself where it is an adapter's folder, ``path/adapter`` where it is a run folder."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    reason = f"has no {CONFIG}, and no adapter/ with one" if path.is_dir() else "is not a folder"
    raise UserError(f"{path} {reason}: give an adapter's folder, or the folder of a run that trained one")


def read_config(folder: Path) -> tuple[Adapter, str]:
    """An adapter, and the name of the model that it was trained on ("" where that is not said).

    Where modules are chosen by a pattern or by layers, the tensors tell which they are. UserError for what is no LoRA,
    DoRA or rsLoRA, or does more than that, naming the setting.
    """
    path, data = folder / CONFIG, _read_json(folder / CONFIG)
    if data.get("peft_type") != "LORA":
        raise UserError(f"{path} says peft_type {data.get('peft_type')!r}: only LORA (with DoRA, rsLoRA) can be read")
    if data.get("use_dora") and data.get("use_rslora"):
        raise UserError(f"{path} has use_dora and use_rslora: only one of them can be read")
    for key in sorted(data.keys() - {*READ, *SELECTION, *INDIFFERENT}):
        if data[key] not in NEUTRAL:
            raise UserError(
                f"{path} sets {key} to {data[key]!r}, which is not built here: train the adapter without it"
            )
    if data.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights {data['init_lora_weights']!r} changed the model's own weights: convert it to a "
            "plain LoRA first (peft: path_initial_model_for_weight_conversion)"
        )
    chosen = data.get("target_modules")
    if isinstance(chosen, list) and not any(data.get(key) for key in SELECTION[1:]):
        targets = tuple(str(name).removeprefix(TRANSFORMER) for name in chosen)
    else:
        names = (from_file_name(name).partition(".lora_") for name in _stored(folder).shapes)
        targets = tuple(dict.fromkeys(module for module, lora, _ in names if lora))
    try:
        kind: Kind = "dora" if data.get("use_dora") else "rslora" if data.get("use_rslora") else "lora"
        adapter = Adapter(kind, data.get("r", 8), data.get("lora_alpha", 8), data.get("lora_dropout", 0.0), targets)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return adapter, str(data.get("base_model_name_or_path") or "")


def open_adapter(folder: Path, config: ModelConfig) -> tuple[Adapter, StoredTensors]:
    """An adapter with its tensors, for a model; UserError where it belongs to another, naming what differs."""
    adapter, _ = read_config(folder)
    try:
        expected = shapes(checked(adapter, config), config)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    stored = _stored(folder)
    for name, shape in stored.shapes.items():
        if name not in expected:
            raise UserError(
                f"{folder} holds {to_file_name(name)}, which is no part of an adapter on this model: it was trained on "
                "another one, or saved with more than the adapter (peft: save_embedding_layers=False)"
            )
        if shape != expected[name]:
            raise UserError(
                f"{folder}: {to_file_name(name)} has shape {shape}, but on this model it must be {expected[name]}: the "
                "adapter was trained on another one"
            )
    if missing := [name for name in expected if name not in stored.shapes]:
        raise UserError(f"{folder} lacks {len(missing)} tensors of its adapter, the first {to_file_name(missing[0])}")
    return adapter, stored


def read_tensor(folder: Path, stored: StoredTensors, name: str) -> Tensor:
    """A tensor of an adapter in fp32; UserError where it holds no numbers, or NaN or infinity."""
    tensor = stored.read(name)
    if tensor.dtype not in FLOATS.values():
        raise UserError(f"{folder}: {to_file_name(name)} is of {tensor.dtype}: it must be of {', '.join(FLOATS)}")
    if not tensor.isfinite().all():
        raise UserError(f"{folder}: {to_file_name(name)} holds NaN or infinity: the adapter is broken")
    return tensor.float()


def _stored(folder: Path) -> StoredTensors:
    """The tensors in an adapter's files, by their names inside the package."""
    pickle = folder / f"{STEM}.bin"
    if pickle.is_file() and not list(folder.glob(f"{STEM}*.safetensors")):
        raise UserError(
            f"{pickle} is a pickle, which can execute code when it is opened: have its maker save it as safetensors "
            "(peft: save_pretrained with safe_serialization=True)"
        )
    return StoredTensors(safetensors_files(folder, STEM), from_file_name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} is not an adapter's folder: it has no {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object with the adapter's keys")
    return data


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """All modules that can be adapted, in the model's order, with the shapes of their weights."""
    names = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(config).items() if len(shape) == 2}
    names.pop("classifier", None)
    return {name: (shape[0], shape[1]) for name, shape in names.items()}


def _matches(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
