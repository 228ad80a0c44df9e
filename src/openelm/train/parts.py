"""From a run config to the parts of a run: tokenizer, token stream, held-out text, model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from openelm.config import RunConfig
from openelm.data.filters import utf8_bytes
from openelm.data.held_out import HeldOut, held_out_set
from openelm.data.packing import Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import Source, Unit, find_units
from openelm.data.stream import TokenStream, is_held_out
from openelm.data.tokenizer import Tokenizer, train_tokenizer
from openelm.data.walk import documents_once
from openelm.errors import UserError
from openelm.interop import corenet_state
from openelm.interop.convert import open_source
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, initial_weights
from openelm.train.checkpoint import GEOMETRY
from openelm.train.parallel import World, build


def sources(config: RunConfig) -> list[Source]:
    """The recipe's sources."""
    return [Source(**section.model_dump()) for section in config.data.sources]


def preparation(config: RunConfig) -> Preparation:
    """The recipe's filters."""
    data = config.data
    return Preparation(data.min_characters, data.min_tokens, data.split_words, data.repair_text)


def token_stream(config: RunConfig, tokenizer: Tokenizer, units: list[list[Unit]] | None = None) -> TokenStream:
    """The rows of the run; ``units`` of each source, where they have been found already."""
    data = config.data
    return TokenStream(
        sources(config),
        tokenizer,
        preparation(config),
        Packing(data.row_length, data.packing, data.cross_pieces, data.separate_pieces),
        seed=config.seed,
        shards=data.shards,
        held_out=data.held_out,
        units=units,
    )


def check_sources(config: RunConfig, tokenizer: Tokenizer, units: list[list[Unit]]) -> None:
    """Make a row of each source by itself; UserError where its filters leave nothing, or its files cannot be read."""
    for source, found in zip(config.data.sources, units, strict=True):
        if source.share:
            alone = config.data.model_copy(update={"sources": (source,), "shards": 1})
            token_stream(config.model_copy(update={"data": alone}), tokenizer, [found]).next_row()


def held_out(config: RunConfig, tokenizer: Tokenizer, units: list[list[Unit]] | None = None) -> HeldOut:
    """The validation text of the run; ``units`` of each source, where they have been found already."""
    return held_out_set(
        sources(config),
        tokenizer,
        preparation(config),
        config.data.row_length,
        fraction=config.data.held_out,
        max_tokens=config.data.validation_tokens,
        seed=config.seed,
        units=units,
    )


def load_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the recipe names, that of the model it begins from, or one trained on its own text.

    A trained one is kept in the cache (OPENELM_CACHE, or ~/.cache/openelm) under the hash of what it depends on.
    """
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path)
    if config.train.init_from:
        found = open_source(config.train.init_from).tokenizer
        if found is None:
            raise UserError(
                f"train.init_from={config.train.init_from} has no tokenizer: set tokenizer.path to the one that its "
                "text was cut with"
            )
        return found
    key = json.dumps(
        [config.tokenizer.model_dump(), config.data.held_out, config.seed, sys.version]
        + [(asdict(source), [(asdict(u), _modified(u.path)) for u in find_units(source)]) for source in sources(config)]
    )
    folder = cache_folder() / "tokenizers" / hashlib.sha256(key.encode()).hexdigest()[:16]
    model = folder / "tokenizer.model"
    if not model.is_file():
        texts = list(training_texts(config, config.tokenizer.train_bytes))
        if not texts:
            raise UserError(
                "no document is left to train a tokenizer on: all are empty, or held out "
                f"(data.held_out={config.data.held_out:g}): give more documents, or lower data.held_out"
            )
        train_tokenizer(texts, model, config.tokenizer.vocab_size)
    return Tokenizer.load(model)


def _modified(path: str) -> int:
    """When a local file was last written; 0 for what is not one."""
    return Path(path).stat().st_mtime_ns if Path(path).is_file() else 0


def cache_folder() -> Path:
    """Where things that can be made again are kept."""
    return Path(os.environ.get("OPENELM_CACHE") or Path.home() / ".cache" / "openelm")


def training_texts(config: RunConfig, max_bytes: int) -> Iterator[str]:
    """Documents of the training text in shuffled order, ``max_bytes`` in all, shared as the sources are mixed."""
    total_share = sum(source.share for source in sources(config))
    for index, source in enumerate(sources(config)):
        left = max_bytes * source.share / total_share
        for text in documents_once(source, (config.seed, index)):
            if left <= 0:
                break
            if not is_held_out(text, config.data.held_out):
                yield text
                left -= utf8_bytes(text)


def geometry(config: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's geometry, checked against tokenizer, rows and the model that the run begins from."""
    section = config.model
    model = section.build(vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, beyond model.vocab_size={model.vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    if config.train.init_from:
        start = open_source(config.train.init_from).config
        differing = [
            f"{name} ({getattr(start, name)} there, {getattr(model, name)} here)"
            for name in GEOMETRY
            if getattr(start, name) != getattr(model, name)
        ]
        if differing:
            raise UserError(
                f"train.init_from={config.train.init_from} differs from the recipe's model in {', '.join(differing)}: "
                "set the recipe's model to that"
            )
    if config.train.init_optimizer:
        training_state(config)
    return model


def training_state(config: RunConfig) -> corenet_state.TrainingState:
    """Step and moments that the run goes on from; UserError where train.init_from has none, or they are too late."""
    path = Path(config.train.init_from or "")
    if not path.is_file():
        raise UserError(
            f"train.init_optimizer=true needs a training state of CoreNet, and {path} is none: leave it out; a run of "
            "ours goes on with --resume"
        )
    state = corenet_state.training_state(path)
    if state.step >= config.train.steps:
        raise UserError(
            f"{path} is of step {state.step}, so train.steps={config.train.steps} leaves nothing to do: set "
            "train.steps to that of the whole run"
        )
    return state


def build_model(config: RunConfig, geometry: ModelConfig, world: World, dtype: torch.dtype) -> OpenELM:
    """The model in fp32 with its first weights, the same on every device and for any number of ranks."""
    train = config.train

    def weights(model: OpenELM) -> Iterable[tuple[str, Tensor]]:
        if train.init_from:
            # A tensor at a time: each of a machine's ranks would hold the whole model otherwise.
            source = open_source(train.init_from)
            return ((name, source.weight(name)) for name, _ in model.named_parameters())
        return initial_weights(model, config.seed)

    return build(
        geometry, world, weights, dtype=dtype, checkpointing=train.activation_checkpointing, compile=train.compile
    )


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """What ``auto`` means here: bf16 wherever the hardware multiplies it, else fp32."""
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if device.type == "cpu":
        # Without AVX-512 or AMX, bf16 products are emulated at a few hundredths of the fp32 rate.
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if supported else torch.float32
    return torch.bfloat16
