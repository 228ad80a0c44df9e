"""OpenAI's objects: whole answers and the chunks of a stream, for completions and for chats."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from openelm.data.tokenizer import Tokenizer
from openelm.serve.choosing import Scored

LEAST = -9999.0  # what a log-probability that JSON has no number for is given as


class Form(Protocol):
    """How one kind of answer is written."""

    scores: bool  # whether log-probabilities are asked for

    def whole(self, index: int, text: str, scored: Sequence[Scored], finish_reason: str) -> dict[str, Any]:
        """A choice of an answer that is given at once."""

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices of chunks before the first text."""

    def part(self, index: int, text: str, scored: Sequence[Scored]) -> dict[str, Any]:
        """A choice of a chunk with more text."""

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        """A choice of the last chunk."""

    def envelope(self, *, chunk: bool) -> dict[str, Any]:
        """What stands around choices."""


class Spelling:
    """Single tokens as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._table = tokenizer, tokenizer.backend.piece_bytes()

    def bytes(self, id: int) -> bytes:
        """What a token adds to a text; for one that adds nothing its name in the vocabulary."""
        return (self._table[id] if self._table else b"") or self._tokenizer.piece(id).encode("utf-8", "replace")

    def text(self, id: int) -> str:
        """The same as text; for a part of a character its bytes, as OpenAI spells them."""
        piece = self.bytes(id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class _Named:
    """Id, time and model, which all chunks of an answer share."""

    def __init__(self, prefix: str, whole: str, chunk: str, model: str, logprobs: bool, spelling: Spelling) -> None:
        self._same = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._objects, self.scores, self._spelling = (whole, chunk), logprobs, spelling

    def envelope(self, *, chunk: bool) -> dict[str, Any]:
        return {**self._same, "object": self._objects[chunk]}


class CompletionForm(_Named):
    """Of /v1/completions. ``echoed`` are the texts of prompts, one a choice, that stand before the completions."""

    def __init__(self, model: str, logprobs: bool, spelling: Spelling, echoed: Sequence[str] | None) -> None:
        super().__init__("cmpl", "text_completion", "text_completion", model, logprobs, spelling)
        self._echoed = echoed
        self._offsets: dict[int, int] = {}  # where the next token of a choice stands in its text

    def whole(self, index: int, text: str, scored: Sequence[Scored], finish_reason: str) -> dict[str, Any]:
        return self._choice(index, self._echo(index) + text, scored, finish_reason)

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._choice(index, self._echo(index), (), None)] if self._echo(index) else []

    def part(self, index: int, text: str, scored: Sequence[Scored]) -> dict[str, Any]:
        return self._choice(index, text, scored, None)

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self._choice(index, "", (), finish_reason)

    def _echo(self, index: int) -> str:
        return self._echoed[index] if self._echoed else ""

    def _choice(self, index: int, text: str, scored: Sequence[Scored], finish_reason: str | None) -> dict[str, Any]:
        logprobs = self._scores(index, scored) if self.scores and scored else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _scores(self, index: int, scored: Sequence[Scored]) -> dict[str, list[Any]]:
        spell = self._spelling.text
        tokens, offsets, place = [spell(one.id) for one in scored], [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(place)
            place += len(token)
        self._offsets[index] = place
        return {
            "tokens": tokens,
            "token_logprobs": [None if one.logprob is None else _number(one.logprob) for one in scored],
            "top_logprobs": [None if one.logprob is None else self._likeliest(one) for one in scored],
            "text_offset": offsets,
        }

    def _likeliest(self, one: Scored) -> dict[str, float]:
        found: dict[str, float] = {}
        for id, value in one.top:  # two tokens may have one spelling: "a" and the byte 0x61
            found.setdefault(self._spelling.text(id), _number(value))
        return found


class ChatForm(_Named):
    """Of /v1/chat/completions."""

    def __init__(self, model: str, logprobs: bool, spelling: Spelling) -> None:
        super().__init__("chatcmpl", "chat.completion", "chat.completion.chunk", model, logprobs, spelling)

    def whole(self, index: int, text: str, scored: Sequence[Scored], finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._scores(scored), "finish_reason": finish_reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None)]

    def part(self, index: int, text: str, scored: Sequence[Scored]) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, self._scores(scored), None)

    def end(self, index: int, finish_reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, None, finish_reason)

    def _chunk(self, index: int, delta: dict[str, str], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _scores(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.scores:
            return None
        content = [
            {**self._token(one.id, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float | None) -> dict[str, Any]:
        spelling = self._spelling
        return {
            "token": spelling.text(id),
            "logprob": _number(logprob or 0.0),
            "bytes": list(spelling.bytes(id)),
        }


def usage(prompt_tokens: int, completion_tokens: int, reused_tokens: int) -> dict[str, Any]:
    """The account of an answer; what of the prompts was there from other texts counts as cached."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reused_tokens},
    }


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
