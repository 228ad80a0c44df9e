"""A model to convert, whoever wrote it: its geometry, and its tensors one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.model.folder import load_config, open_tensors, tensor_shapes
from openelm.model.geometry import SIZES, ModelConfig
from openelm.model.quantize import Quantized

if TYPE_CHECKING:
    from openelm.data.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True)
class Source:
    """What every reader gives and every writer takes. Tensor names are those inside the package (CoreNet's)."""

    origin: str  # for messages: the path or Hub id
    config: ModelConfig
    dtype: torch.dtype  # of the stored matrices; of what they stand for, where they are quantised
    read: Callable[[str], Tensor]  # by name, on the CPU; called once a tensor, when the one before is done with
    quantized: bool = False  # whether what is read was rounded to few bits before
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    card: str | None = None  # README.md of the source: licence and base model are carried over from it
    licence: str | None = None  # text of its LICENSE file
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json
    notes: tuple[str, ...] = ()  # what was dropped or assumed in reading, for the user
    adapter: str = ""  # name of one that was merged in: the model is then another than its card says
    # Quantised with more care than rounding takes; a format of the same bits and groups writes them as they are.
    codes: Mapping[str, Quantized] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in the model's order; a shared embedding stands once."""
        return tensor_shapes(self.config)

    def weight(self, name: str) -> Tensor:
        """A tensor, looked at: UserError where it holds NaN or infinity, or is not of the geometry's shape."""
        tensor = self.read(name)
        expected = self.shapes[name]
        if tuple(tensor.shape) != expected:
            raise UserError(f"{self.origin}: {name} has shape {tuple(tensor.shape)}, but the geometry gives {expected}")
        # A sum is finite where all are, and takes no copy; it may overflow where they are, so only then each is seen.
        if not tensor.float().sum().isfinite() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{self.origin}: {name} holds {bad} values that are NaN or infinite: the model is broken; take a "
                "checkpoint from before it broke"
            )
        return tensor


def open_folder(folder: Path) -> Source:
    """A model folder: ours, Apple's, mlx-lm's (quantised too), or a checkpoint of a run; UserError otherwise."""
    from openelm.data.tokenizer import Tokenizer

    config, _ = load_config(folder)
    stored = open_tensors(folder)
    stored.check(tensor_shapes(config))
    tokenizer, notes = None, []
    # A run keeps one tokenizer for all its checkpoints.
    for place in (folder, folder.parent.parent / "tokenizer"):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = Tokenizer.load(place)
            notes += _left_behind(place, tokenizer)
            break
    if stored.quantized_dtype is not None:
        notes.append(f"{folder} is quantised: what follows has the values that its codes stand for")
    return Source(
        origin=str(folder),
        config=config,
        dtype=widest(stored.dtypes()),
        read=stored.read,
        quantized=stored.quantized_dtype is not None,
        tokenizer=tokenizer,
        chat_template=read_chat_template(folder),
        generation=_json(folder / "generation_config.json"),
        notes=tuple(notes),
        card=read_text(folder / "README.md"),
        licence=read_text(next(iter(sorted(folder.glob("LICENSE*"))), folder / "LICENSE")),
    )


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype that holds what all of these hold; float32 for anything wider."""
    found = set(dtypes)
    return found.pop() if found in ({torch.bfloat16}, {torch.float16}) else torch.float32


def with_tokenizer(source: Source, tokenizer: Tokenizer) -> Source:
    """The source with a tokenizer, whose begin and end of text are then the model's. UserError: it is too large."""
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model of {source.origin} only "
            f"{source.config.vocab_size} rows: they do not belong together"
        )
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    was = {name: getattr(source.config, name) for name in ends}
    note = f"begin and end of text are the tokenizer's, {tokenizer.bos_id} and {tokenizer.eos_id}; the model said "
    note += f"{was['bos_token_id']} and {was['eos_token_id']}"
    return replace(
        source,
        tokenizer=tokenizer,
        config=source.config.changed(**ends),
        notes=(*source.notes, note) if was != ends else source.notes,
    )


def _left_behind(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """What tokenizer.json knows and tokenizer.model, which is taken where both are there, does not."""
    vocabulary = _json(folder / "tokenizer.json").get("added_tokens") or []
    added = [entry["content"] for entry in vocabulary if entry.get("id", 0) >= tokenizer.vocab_size]
    if not added:
        return []
    return [f"{folder}: tokenizer.json has {len(added)} tokens more than tokenizer.model ({added[0]}, …): left behind"]


def read_chat_template(folder: Path) -> str | None:
    """From its own file, or from tokenizer_config.json, where older folders have it."""
    older = _json(folder / "tokenizer_config.json").get("chat_template")
    return read_text(folder / "chat_template.jinja") or (older if isinstance(older, str) else None)


def _json(file: Path) -> dict[str, Any]:
    """An object of a file that may be missing; UserError where it is damaged."""
    try:
        data = json.loads(read_text(file) or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from error
    return data if isinstance(data, dict) else {}


def read_text(file: Path) -> str | None:
    """Content of a file, None where there is none. UserError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): convert it first") from error


def with_vocabulary(source: Source, vocab_size: int) -> Source:
    """The source with the first ``vocab_size`` rows of its embedding (and output layer) only.

    UserError where it has fewer, or where its tokenizer has ids beyond.
    """
    rows = source.config.vocab_size
    if vocab_size == rows:
        return source
    if not 0 < vocab_size < rows:
        raise UserError(f"a vocabulary of {vocab_size}: {source.origin} has {rows} rows; ask for {rows} or fewer")
    if source.tokenizer is not None and source.tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"a vocabulary of {vocab_size} would cut off ids of the tokenizer, which has {source.tokenizer.vocab_size}"
        )

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        return tensor[:vocab_size] if name in ("token_embeddings.weight", "classifier.weight") else tensor

    note = f"vocabulary {rows} -> {vocab_size}: rows {vocab_size} to {rows - 1} of the embedding were dropped"
    return replace(
        source,
        config=source.config.changed(vocab_size=vocab_size),
        read=read,
        notes=(*source.notes, note),
    )


def geometry_of(shapes: Mapping[str, tuple[int, ...]], origin: str, **known: Any) -> ModelConfig:
    """The geometry that a model's tensors have (names inside the package), for formats that do not state it.

    One of the named sizes where it is one, so that its multipliers read as the paper's. ``known`` are further fields of
    ModelConfig; without q_norm tensors ``head_dim`` must be among them. UserError for shapes that are not an OpenELM's.
    """
    try:
        vocab_size, model_dim = shapes["token_embeddings.weight"]
        layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
        qk_norm = "layers.0.attn.q_norm.weight" in shapes
        if not qk_norm and "head_dim" not in known:
            raise UserError(
                f"{origin} does not normalise queries and keys, so that its shapes do not tell the width of a head: "
                "convert from a format that states it (a model folder)"
            )
        head_dim = shapes["layers.0.attn.q_norm.weight"][0] if qk_norm else known["head_dim"]
        query = [shapes[f"layers.{i}.attn.out_proj.weight"][1] // head_dim for i in range(layers)]
        total = [shapes[f"layers.{i}.attn.qkv_proj.weight"][0] // head_dim for i in range(layers)]
        ffn = [shapes[f"layers.{i}.ffn.proj_2.weight"][1] for i in range(layers)]
        groups = {2 * q // (t - q) for q, t in zip(query, total, strict=True)}
        (num_gqa_groups,) = groups
    except KeyError as error:
        raise UserError(f"{origin} is not an OpenELM: it lacks {error.args[0]}") from error
    except UserError:
        raise
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"{origin}: the shapes of its tensors are not those of an OpenELM ({error})") from error
    given = {
        **known,
        "vocab_size": vocab_size,
        "normalize_qk_projections": qk_norm,
        "share_input_output_layers": "classifier.weight" not in shapes,
    }
    for size in SIZES:
        config = ModelConfig.from_name(size)
        same = (config.model_dim, config.head_dim, config.num_gqa_groups) == (model_dim, head_dim, num_gqa_groups)
        if same and list(config.num_query_heads) == query and list(config.ffn_dims) == ffn:
            return config.changed(**given)
    return ModelConfig(
        **{
            **given,
            "model_dim": model_dim,
            "head_dim": head_dim,
            "num_transformer_layers": layers,
            "num_gqa_groups": num_gqa_groups,
            "qkv_multipliers": tuple(q * head_dim / model_dim for q in query),
            "ffn_multipliers": tuple(width / model_dim for width in ffn),
            "ffn_dim_divisor": math.gcd(*ffn),
        }
    )
