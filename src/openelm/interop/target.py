"""What a format to write is: its checks, its writer, and the engine that can be asked whether it was written right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.interop.card import converted_card
from openelm.interop.source import Source


@dataclass(frozen=True)
class Format:
    """What is asked for beside the weights; ``quantize`` is one of the target's own names, "" for none."""

    dtype: torch.dtype
    quantize: str = ""
    group_size: int = 64


@dataclass(frozen=True)
class Target:
    """A format. ``check`` refuses what it cannot express, before anything is written; ``write`` fills a draft.

    ``stored`` reads back what was written, quantised weights as the values that they stand for. ``logits`` gives the
    (B, T, V) fp32 logits of rows of ids, all equally long, as ``engine`` computes them from it; it raises
    MissingEngineError where that is not installed.
    """

    engine: str
    is_file: bool
    check: Callable[[Source, Format], None]
    write: Callable[[Path, Source, Format], None]
    stored: Callable[[Path], Source]
    logits: Callable[[Path, list[list[int]]], Tensor]


class MissingEngineError(UserError):
    """The engine that would run a converted model is not installed here."""


def write_beside(folder: Path, source: Source, library: str = "transformers", quantize: str = "") -> None:
    """What stands beside the weights in every folder: tokenizer, chat template, licence, README.md."""
    if source.tokenizer is not None:
        source.tokenizer.save(folder)
    generation = folder / "generation_config.json"
    if source.generation and generation.is_file():
        # What it says of sampling is kept; begin and end of text are those written just now, or a list with them.
        written = json.loads(generation.read_text(encoding="utf-8"))
        ends = source.generation.get("eos_token_id")
        if isinstance(ends, list) and written["eos_token_id"] in ends:
            written["eos_token_id"] = ends
        settings = {**source.generation, **written}
        generation.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.chat_template is not None:
        (folder / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    if source.licence is not None:
        (folder / "LICENSE").write_text(source.licence, encoding="utf-8")
    (folder / "README.md").write_text(converted_card(source, library=library, quantize=quantize), encoding="utf-8")
