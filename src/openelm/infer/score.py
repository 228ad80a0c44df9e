"""How well a model predicts a text: perplexity and bits per byte, every token counted once.

Shapes: B windows, T tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.model.loss import IGNORE
from openelm.model.transformer import OpenELM


@dataclass(frozen=True)
class Score:
    """Cross-entropy of a text in nats, and the tokens and UTF-8 bytes that it is spread over; scores can be added."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different vocabularies, and with file compressors."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token: comparable between models with the same vocabulary only."""
        return math.exp(self.nats / self.tokens)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def score_text(
    model: OpenELM, tokenizer: Tokenizer, text: str, *, stride: int | None = None, batch_size: int = 1
) -> Score:
    """Score of one document: BOS is its context and is not counted; EOS, which stands for no byte, is left out."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    return perplexity(model, ids, len(text.encode("utf-8")), stride=stride, batch_size=batch_size)


def perplexity(
    model: OpenELM, ids: Sequence[int], num_bytes: int, *, stride: int | None = None, batch_size: int = 1
) -> Score:
    """Score of ``ids``, of which the first is context alone, for a text of ``num_bytes``.

    A text longer than the model's context is read in windows of that length, each ``stride`` tokens (default: half the
    context) after the one before; a token is scored in the first window that reaches it, so that it sees at least
    context - stride tokens before it (all, near the beginning). ``batch_size`` windows are computed at a time.
    """
    length = model.config.max_context_length
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must be at least 1 and at most the model's context of {length}")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if len(ids) < 2 or num_bytes < 1:
        raise UserError("there is no text to score: it has no token")
    outside = next((id for id in ids if not 0 <= id < model.config.vocab_size), None)
    if outside is not None:
        raise UserError(f"token id {outside} is outside the model's vocabulary of {model.config.vocab_size}")
    spans = windows(len(ids) - 1, length, stride)
    sums: list[float] = []
    while batch := list(islice(spans, batch_size)):
        sums.append(_nats(model, ids, batch))
    nats = math.fsum(sums)
    if not math.isfinite(nats):
        raise UserError("the loss is not finite: damaged weights, or float16 has overflowed; try float32 or bfloat16")
    return Score(nats, len(ids) - 1, num_bytes)


def windows(targets: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of each window over ``targets`` predictions; the scored parts tile them."""
    start = done = 0
    while done < targets:
        end = min(start + length, targets)
        yield start, done, end
        start, done = start + stride, end


@torch.no_grad()
def _nats(model: OpenELM, ids: Sequence[int], batch: list[tuple[int, int, int]]) -> float:
    width = max(end - start for start, _, end in batch)
    tokens, targets = [], []
    for start, first, end in batch:
        filling = width - (end - start)  # on the right, where causal attention never looks
        tokens.append([*ids[start:end], *[0] * filling])
        targets.append([*[IGNORE] * (first - start), *ids[first + 1 : end + 1], *[IGNORE] * filling])
    device = model.token_embeddings.weight.device
    tokens_BT, targets_BT = (torch.tensor(rows, dtype=torch.int64, device=device) for rows in (tokens, targets))
    return float(model(tokens_BT, targets_BT))
