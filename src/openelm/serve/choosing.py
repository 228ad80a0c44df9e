"""The next token of texts that advance together, each by its own rules, and how likely tokens are.

Shapes: B texts, T places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from openelm.infer.sampling import Sampling, next_tokens


@dataclass(frozen=True)
class Rules:
    """How one text's tokens are chosen: its sampling, and what OpenAI's interface has beside it.

    From the logits of tokens that the completion already has ``presence_penalty`` is taken once, ``frequency_penalty``
    as often as they occur; then ``logit_bias`` is added, and ``sampling`` does the rest. ``logprobs`` are those of the
    model, before all that: of the chosen token and of so many of the likeliest.
    """

    sampling: Sampling = field(default_factory=Sampling)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability (None at the beginning of a text), and the likeliest at its place."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Grammar(Protocol):
    """Which tokens may come next (response_format.py has one)."""

    def mask(self) -> Tensor:
        """True (V,) for those, of which there is one at least."""

    def push(self, id: int) -> None:
        """Go on behind a token."""


class Chooser:
    """The rules of one text, and what they must know of it."""

    def __init__(self, rules: Rules, prompt: Sequence[int], vocab_size: int, allowed: Grammar | None = None) -> None:
        self.rules, self.position, self._allowed = rules, len(prompt), allowed
        # The seed is a row's own in a batch, so that all else decides which rows are chosen for together.
        self.group, self.seed = replace(rules.sampling, seed=0), rules.sampling.seed
        self.seen_V: Tensor | None = None
        if rules.sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen_V[list(prompt)] = True
        self._counts_V: Tensor | None = None
        if rules.presence_penalty or rules.frequency_penalty:
            self._counts_V = torch.zeros(vocab_size)
        self._bias_V: Tensor | None = None
        if rules.logit_bias:
            self._bias_V = torch.zeros(vocab_size)
            for id, bias in rules.logit_bias:
                self._bias_V[id] = bias
        self.moves = self._counts_V is not None or self._bias_V is not None or allowed is not None

    def move(self, logits_V: Tensor) -> None:
        """Change logits in place as the rules ask."""
        if self._counts_V is not None:
            counts_V, rules = self._counts_V.to(logits_V.device), self.rules
            logits_V -= rules.frequency_penalty * counts_V + rules.presence_penalty * (counts_V > 0)
        if self._bias_V is not None:
            logits_V += self._bias_V.to(logits_V.device)
        if self._allowed is not None:
            logits_V.masked_fill_(~self._allowed.mask().to(logits_V.device), -torch.inf)

    def note(self, id: int) -> None:
        """Remember the token that was chosen."""
        self.position += 1
        if self.seen_V is not None:
            self.seen_V[id] = True
        if self._counts_V is not None:
            self._counts_V[id] += 1
        if self._allowed is not None:
            self._allowed.push(id)


def choose(logits_BV: Tensor, choosers: Sequence[Chooser], vocab_size: int) -> list[Scored]:
    """One token for each row; texts whose rules are alike are chosen for together.

    The logits may be wider than ``vocab_size``, and what lies behind it is never chosen.
    """
    moved_BV = logits_BV[:, :vocab_size].float()
    if any(chooser.moves for chooser in choosers):
        moved_BV = moved_BV.clone()
        for logits_V, chooser in zip(moved_BV, choosers, strict=True):
            chooser.move(logits_V)
    groups: dict[Sampling, list[int]] = {}
    for row, chooser in enumerate(choosers):
        groups.setdefault(chooser.group, []).append(row)
    ids = [0] * len(choosers)
    for sampling, rows in groups.items():
        part_BV = moved_BV if len(rows) == len(choosers) else moved_BV[rows]
        for row, id in zip(rows, _chosen(part_BV, sampling, [choosers[row] for row in rows]), strict=True):
            ids[row] = id
    scored = [Scored(id, None) for id in ids]
    for row, chooser in enumerate(choosers):
        chooser.note(ids[row])
        if chooser.rules.logprobs is not None:
            scored[row] = score(logits_BV[row : row + 1], ids[row : row + 1], chooser.rules.logprobs, vocab_size)[0]
    return scored


def _chosen(logits_BV: Tensor, sampling: Sampling, choosers: Sequence[Chooser]) -> list[int]:
    device = logits_BV.device
    seen = [chooser.seen_V for chooser in choosers if chooser.seen_V is not None]
    ids: list[int] = next_tokens(
        logits_BV,
        sampling,
        seeds_B=torch.tensor([chooser.seed for chooser in choosers], device=device),
        positions_B=torch.tensor([chooser.position for chooser in choosers], device=device),
        seen_BV=torch.stack(seen).to(device) if seen else None,
    ).tolist()
    return ids


def score(logits_TV: Tensor, ids: Sequence[int], top: int, vocab_size: int) -> list[Scored]:
    """How likely each of ``ids`` is after the place with its logits, and the ``top`` likeliest there.

    Log-probabilities are those of the whole width, as everywhere in the project.
    """
    logits_TV = logits_TV.float()
    total_T = logits_TV.logsumexp(-1)
    ids_T = torch.tensor(ids, device=logits_TV.device)
    logprobs = (logits_TV.gather(1, ids_T[:, None])[:, 0] - total_T).tolist()
    if not top:
        return [Scored(id, logprob) for id, logprob in zip(ids, logprobs, strict=True)]
    best_TK, which_TK = logits_TV[:, :vocab_size].topk(min(top, vocab_size))
    likeliest = zip(which_TK.tolist(), (best_TK - total_T[:, None]).tolist(), strict=True)
    return [
        Scored(id, logprob, tuple(zip(which, best, strict=True)))
        for id, logprob, (which, best) in zip(ids, logprobs, likeliest, strict=True)
    ]
