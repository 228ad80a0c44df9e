"""Speculative decoding: a few tokens are drafted cheaply, and the model looks at all of them in one pass.

At batch 1 a pass costs the reading of the weights, whether one token goes through them or five. So a smaller model, or
the text so far, drafts the next tokens; the model computes what it chooses behind each of them; and drafted tokens
stay up to the first for which it chose another.

The model's choice is a function of its logits, the seed and the place (sampling.py), and drafts are compared with just
that choice. So the text is that of plain decoding, greedy or drawn, whatever the draft: a draft only decides how many
tokens a pass gives. Models that draft choose with the same noise, and agree with the model at least (1 - D) / (1 + D)
of the time, where D is the total variation distance of the two distributions (Daliri, Musco and Suresh 2024). To accept
and reject at random (Leviathan, Kalman and Matias 2023) agrees 1 - D of the time, but then each draft gives another
text.

What remains is rounding: a pass over several tokens may add in another order than a pass over one, and where two
tokens are as good as equal, either may be chosen. docs/speculative.md has figures.

Shapes: T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openelm.data.chat import common_length
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.infer.sampling import Sampling, next_tokens
from openelm.infer.slots import Decoder, Slots

DRAFT_TOKENS = 3  # with the one before them four, to which the CPU decoder gives the same bits as to one
LOOKUP_TOKENS = 3


@dataclass
class Account:
    """What drafting has come to."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0  # of the model, behind the first token of a text

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that stayed; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float | None:
        """A pass gives one token more than it accepts; None before the first."""
        return 1 + self.accepted / self.passes if self.passes else None


class Speculation:
    """How tokens are drafted, for any number of texts, and in ``account`` what came of it.

    ``draft`` is a smaller model with the same vocabulary (``check_vocabulary``). Without one, drafts are copied from
    the text so far: what followed its last ``lookup`` tokens, or fewer, where they stood before. At most ``tokens``
    are drafted for a pass. Raises UserError.
    """

    def __init__(
        self, draft: Decoder | None = None, *, lookup: int = LOOKUP_TOKENS, tokens: int = DRAFT_TOKENS
    ) -> None:
        if tokens < 1:
            raise UserError(f"{tokens} draft tokens: give at least 1, or leave drafting out")
        if lookup < 1:
            raise UserError(f"a lookup of {lookup} tokens: give at least 1, or leave it out")
        self._draft, self._lookup, self._most = draft, lookup, tokens
        self._kept: tuple[Slots, list[int]] | None = None  # of the draft, from the last text: slots, what they hold
        self.account = Account()

    def steps(
        self,
        slots: Slots,
        slot: int,
        logits_V: Tensor,
        text: list[int],
        count: int,
        sampling: Sampling,
        vocab_size: int,
    ) -> Generator[list[int]]:
        """The next ``count`` token ids of a text, some at a time; whoever iterates decides when it has ended.

        ``slot`` holds ``text`` and has room for ``count`` - 1 more. ``logits_V`` are those after it; of them the first
        ``vocab_size`` are chosen from. ``text`` grows by what is given out; the slot then holds all but its last token.
        """
        if count < 1:
            return
        end, hoped = len(text) + count, self._most
        choose, drafts = _Choice(sampling, vocab_size), self._begin(_Choice(sampling, vocab_size), end)
        chosen = choose(logits_V[None], text, [])
        try:
            while True:
                text += chosen
                yield chosen
                if len(text) == end:
                    return
                # One token fewer than there is room for: the model adds one of its own.
                drafted = drafts.propose(text, min(hoped, end - len(text) - 1))
                held = slots.length(slot)
                if drafted:
                    logits_TV = slots.verify(slot, [text[-1], *drafted])
                else:
                    logits_TV = slots.decode([slot], torch.tensor(text[-1:], device=logits_V.device))
                chosen = choose(logits_TV, text, drafted)
                accepted = common_length(drafted, chosen)
                del chosen[accepted + 1 :]  # chosen behind a token that is not there
                slots.truncate(slot, held + 1 + accepted)
                self.account.passes += 1
                self.account.drafted += len(drafted)
                self.account.accepted += accepted
                if drafted:
                    # Two more than stayed: little is wasted where drafts go wrong early, and good ones grow.
                    hoped = min(self._most, accepted + 2)
        finally:
            if isinstance(drafts, _Computed):
                self._kept = drafts.slots, drafts.held

    def _begin(self, choose: _Choice, end: int) -> _Copied | _Computed:
        """Drafts for a text that will have ``end`` tokens at most."""
        if self._draft is None:
            return _Copied(self._lookup)
        limit = self._draft.config.max_context_length
        kept, self._kept = self._kept, None  # two texts at once have slots of their own
        if kept is None or kept[0].capacity < min(limit, end):
            # Room for what may follow: a conversation grows.
            kept = self._draft.slots(1, min(limit, max(256, 2 * end))), []
        return _Computed(*kept, choose, self._draft.device)


class _Choice:
    """Chooses tokens behind a growing text, as plain decoding does."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self._sampling, self._vocab_size = sampling, vocab_size
        self._seen_V: Tensor | None = None
        self._marked = 0  # tokens of the text that are marked as seen

    def __call__(self, logits_TV: Tensor, text: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """The tokens that follow ``text`` with the first drafted ones; the last of the T with all of them."""
        T, device = len(logits_TV), logits_TV.device
        fewest = len(drafted) + 1 - T
        first = len(text) + fewest
        ids: list[int] = next_tokens(
            logits_TV[:, : self._vocab_size],
            self._sampling,
            seeds_B=torch.full((T,), self._sampling.seed, device=device),
            positions_B=torch.arange(first, first + T, device=device),
            seen_BV=self._seen(text, drafted, fewest, device),
        ).tolist()
        return ids

    def _seen(self, text: Sequence[int], drafted: Sequence[int], fewest: int, device: torch.device) -> Tensor | None:
        """Tokens that occur before each of the T choices (T, V), where a penalty asks for them."""
        if self._sampling.repetition_penalty == 1:
            return None
        if self._seen_V is None:
            self._seen_V = torch.zeros(self._vocab_size, dtype=torch.bool, device=device)
        self._seen_V[torch.tensor(text[self._marked :], dtype=torch.int64, device=device)] = True
        self._marked = len(text)
        seen_TV = self._seen_V.repeat(len(drafted) + 1 - fewest, 1)
        for place, id in enumerate(drafted):
            seen_TV[max(0, place + 1 - fewest) :, id] = True
        return seen_TV


class _Computed:
    """Drafts of a smaller model. What a text has in common with the one before it is not computed again."""

    def __init__(self, slots: Slots, held: list[int], choose: _Choice, device: torch.device) -> None:
        self.slots, self.held = slots, held  # what the first slot holds
        self._choose, self._device = choose, device
        self._known = 0  # tokens held that are known to be the text's

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow ``text``, which has grown since the last call."""
        # The last drafted token is not run; a text that has outgrown this model's context gets no drafts.
        count = min(count, self.slots.capacity - len(text) + 1)
        if count < 1:
            return []
        self._known += common_length(self.held[self._known :], text[self._known : -1])
        self.slots.truncate(0, self._known)
        del self.held[self._known :]
        drafted = self._choose(self._run(text[self._known :]), text, [])
        self._known = len(text)
        while len(drafted) < count:
            drafted += self._choose(self._run(drafted[-1:]), text, drafted)
        return drafted

    def _run(self, ids: Sequence[int]) -> Tensor:
        """Logits (1, V) after some more tokens."""
        if len(ids) == 1:
            logits_1V = self.slots.decode([0], torch.tensor(ids, device=self._device))
        else:
            logits_1V = self.slots.prefill([0], [ids])
        self.held += ids
        return logits_1V


class _Copied:
    """Drafts copied from the text: what followed the longest run of its last tokens that stood in it before."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._ends: dict[tuple[int, ...], int] = {}  # where a run of tokens stood last, as the place behind it
        self._indexed = 0

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """``count`` tokens that may follow ``text``, which has grown since the last call; none where all is new."""
        # Runs that the last token ends are left for the next time: nothing follows them yet.
        for end in range(self._indexed + 1, len(text)):
            for length in range(1, min(self._longest, end) + 1):
                self._ends[tuple(text[end - length : end])] = end
        self._indexed = len(text) - 1
        for length in range(min(self._longest, len(text) - 1), 0, -1):
            if start := self._ends.get(tuple(text[-length:])):
                # What repeats itself is taken to go on so, past the end of the text.
                return [text[start + place % (len(text) - start)] for place in range(count)]
        return []


def check_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """UserError where the ids of a draft stand for other tokens than those of the model that it drafts for."""
    ours, theirs = target.backend.pieces, draft.backend.pieces
    remedy = "draft with a model that was trained with the same tokenizer"
    if len(ours) != len(theirs):
        raise UserError(f"the draft's tokenizer has {len(theirs)} tokens, the model's {len(ours)}: {remedy}")
    other = common_length(ours, theirs)
    if other < len(ours):
        raise UserError(f"token {other} is {theirs[other]!r} for the draft, {ours[other]!r} for the model: {remedy}")
