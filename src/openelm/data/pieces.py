"""One document -> its pieces: split, filtered, repaired and tokenised, each with the reason where it is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from openelm.data.filters import has_characters, normalized_characters, repair, split_pieces

TOO_FEW_CHARACTERS = "too_few_characters"
TOO_FEW_TOKENS = "too_few_tokens"


class Tokenizer(Protocol):
    """What the data path needs of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Piece:
    """A piece of a document; ``ids`` (BOS and EOS included) is empty where ``reason`` says why it was dropped."""

    text: str
    ids: list[int]
    reason: str = ""


@dataclass(frozen=True)
class Preparation:
    """What happens to a document; the defaults are the paper's."""

    min_characters: int = 200
    min_tokens: int = 256
    split_words: int = 2048
    repair_text: bool = True

    def pieces(self, text: str, tokenizer: Tokenizer) -> Iterator[Piece]:
        """The pieces of a document in reading order; tokens are counted with BOS and EOS."""
        for part in split_pieces(text, self.split_words):
            yield self.piece(part, tokenizer)

    def piece(self, part: str, tokenizer: Tokenizer) -> Piece:
        """One piece, as far as the filters let it come."""
        if not has_characters(part, self.min_characters):
            return Piece(part, [], TOO_FEW_CHARACTERS)
        text = repair(part) if self.repair_text else part
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        if len(ids) < self.min_tokens:
            return Piece(text, [], TOO_FEW_TOKENS)
        return Piece(text, ids)

    def inspect(self, text: str, tokenizer: Tokenizer) -> Iterator[dict[str, object]]:
        """Every piece with all its counts, dropped ones included (for looking, not for training)."""
        for number, part in enumerate(split_pieces(text, self.split_words)):
            piece = self.piece(part, tokenizer)
            repaired = repair(part) if self.repair_text else part
            ids = [tokenizer.bos_id, *tokenizer.encode(repaired), tokenizer.eos_id]
            yield {
                "piece": number,
                "normalized_characters": normalized_characters(part),
                "tokens": len(ids),
                "kept": not piece.reason,
                "reason": piece.reason or None,
                "ids": ids,
            }
