"""What a format to write is: its checks, its writer, and the engine that can be asked whether it was written right."""

from __future__ import annotations

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

    ``logits`` gives the (B, T, V) fp32 logits of rows of ids, all equally long, as ``engine`` computes them from what
    was written; it raises MissingEngineError where that is not installed.
    """

    engine: str
    is_file: bool
    check: Callable[[Source, Format], None]
    write: Callable[[Path, Source, Format], None]
    logits: Callable[[Path, list[list[int]]], Tensor]


class MissingEngineError(UserError):
    """The engine that would run a converted model is not installed here."""


def write_beside(folder: Path, source: Source) -> None:
    """What stands beside the weights in every folder: tokenizer, chat template, licence, README.md."""
    if source.tokenizer is not None:
        source.tokenizer.save(folder)
    if source.chat_template is not None:
        (folder / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    if source.licence is not None:
        (folder / "LICENSE").write_text(source.licence, encoding="utf-8")
    (folder / "README.md").write_text(converted_card(source), encoding="utf-8")
