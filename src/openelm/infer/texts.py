"""Several texts on their way: prompts in, then the next token of those that go on, as often as one asks.

Shapes: B texts that go on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openelm.data.chat import common_length
from openelm.infer.sampling import Sampling, next_tokens
from openelm.infer.slots import Slots

WORTH_SHARING = 16  # tokens that prompts must have in common before these are computed once, in a pass of their own


class Texts:
    """Text n in slot n. With ``slide``, a slot that is full keeps its first token and the last half of its text."""

    def __init__(
        self,
        slots: Slots,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        vocab_size: int,
        device: torch.device,
        slide: bool = False,
    ) -> None:
        """What slots hold already is the beginning of their texts."""
        self.ids = [list(prompt) for prompt in prompts]
        self._slots, self._sampling, self._slide = slots, sampling, slide
        # An embedding is often wider than the vocabulary; what only fills it up is never chosen.
        self._vocab_size = vocab_size
        # The host reads a GPU's choice while the next step runs already; in a slide it must know the choice before.
        self._ahead = device.type == "cuda" and not slide
        self._rows = list(range(len(prompts)))
        self._made = 0
        self._tokens_B: Tensor | None = None  # chosen, and not run yet
        self._seeds_B = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._lengths_B = torch.tensor([len(ids) for ids in self.ids], device=device)
        self._seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(self.ids):
                self._seen_BV[row, torch.tensor(ids, device=device)] = True
        self._logits_BV = self._prefill()

    def step(self, rows: list[int]) -> list[int]:
        """The next token of texts ``rows``, a part of those of the step before."""
        if rows != self._rows:
            self._narrow(rows)
        if self._tokens_B is not None:
            self._logits_BV = self._advance(rows, self._tokens_B)
        tokens_B = next_tokens(
            self._logits_BV[:, : self._vocab_size],
            self._sampling,
            seeds_B=self._seeds_B,
            positions_B=self._lengths_B + self._made,
            seen_BV=self._seen_BV,
        )
        self._made += 1
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B[:, None], True)
        self._tokens_B = tokens_B
        if self._ahead and all(self._slots.length(row) < self._slots.capacity for row in rows):
            ids = self._read_ahead(rows, tokens_B)
        else:
            ids = tokens_B.tolist()
        for row, id in zip(rows, ids, strict=True):
            self.ids[row].append(id)
        return ids

    def held(self) -> list[int]:
        """What the first slot holds, for the next who asks; nothing after its window slid."""
        length = self._slots.length(0)
        return self.ids[0][:length] if len(self.ids[0]) <= self._slots.capacity else []

    def _read_ahead(self, rows: list[int], tokens_B: Tensor) -> list[int]:
        chosen = torch.empty(len(rows), dtype=torch.int64, pin_memory=True).copy_(tokens_B, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._logits_BV, self._tokens_B = self._slots.decode(rows, tokens_B), None
        copied.synchronize()
        ids: list[int] = chosen.tolist()
        return ids

    def _prefill(self) -> Tensor:
        """Logits (B, V) after every prompt; what prompts have in common is computed once, and what slots hold not."""
        slots = self._slots
        # Samples of one prompt: the first computes it.
        owners: dict[tuple[int, ...], int] = {}
        for row, ids in enumerate(self.ids):
            owners.setdefault(tuple(ids), row)
        rows = list(owners.values())
        texts = [self._window(self.ids[row]) for row in rows]
        shared = common_prefix(texts)
        if len(rows) > 1 and shared >= WORTH_SHARING:
            slots.prefill(rows[:1], [texts[0][:shared]])
            for row in rows[1:]:
                slots.copy(rows[0], row)
        logits_UV = slots.prefill(rows, [text[slots.length(row) :] for row, text in zip(rows, texts, strict=True)])
        for row, ids in enumerate(self.ids):
            if (owner := owners[tuple(ids)]) != row:
                slots.copy(owner, row)
        places = {row: place for place, row in enumerate(rows)}
        return logits_UV[[places[owners[tuple(ids)]] for ids in self.ids]]

    def _advance(self, rows: list[int], tokens_B: Tensor) -> Tensor:
        slots = self._slots
        full = [row for row in rows if slots.length(row) == slots.capacity] if self._slide else []
        if not full:
            return slots.decode(rows, tokens_B)
        for row in full:
            slots.truncate(row, 0)
        going = [row for row in rows if row not in full]
        logits = dict(zip(full, slots.prefill(full, [self._window(self.ids[row]) for row in full]), strict=True))
        if going:
            kept = torch.tensor([place for place, row in enumerate(rows) if row in going], device=tokens_B.device)
            logits |= dict(zip(going, slots.decode(going, tokens_B[kept]), strict=True))
        return torch.stack([logits[row] for row in rows])

    def _window(self, ids: list[int]) -> list[int]:
        """What a slot shall hold of a text: all, or where it has outgrown the slot its beginning and its last half."""
        capacity = self._slots.capacity
        if not self._slide or len(ids) <= capacity:
            return ids
        return [ids[0], *ids[len(ids) - capacity // 2 :]]

    def _narrow(self, rows: list[int]) -> None:
        kept = torch.tensor([self._rows.index(row) for row in rows], device=self._seeds_B.device)
        self._logits_BV, self._seeds_B = self._logits_BV[kept], self._seeds_B[kept]
        self._lengths_B, self._rows = self._lengths_B[kept], rows
        if self._tokens_B is not None:
            self._tokens_B = self._tokens_B[kept]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[kept]


def common_prefix(texts: Sequence[list[int]]) -> int:
    """Tokens that all texts begin with, one less than the shortest has at most: each keeps one to run."""
    least, most = min(texts), max(texts)  # in the order of words all others lie between
    return max(0, min(common_length(least, most), min(map(len, texts)) - 1))
