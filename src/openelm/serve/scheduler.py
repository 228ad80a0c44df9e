"""Continuous batching: one thread that owns the engine's slots, and texts that join and leave between two tokens.

A turn of the thread is: let go of what was cancelled; a piece of the prompts that came in; one token of every text that
runs. So a long prompt makes the others slower for some turns, and stops none of them.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from openelm.infer.slots import Decoder
from openelm.infer.writing import Writer
from openelm.serve.choosing import Chooser, Scored, choose, score
from openelm.serve.fair_queue import FairQueue
from openelm.serve.places import Places

# Tokens of prompts in one turn. On a CPU 64 hold the others up half as long as 128 do, and a prompt takes an eighth
# longer; a GPU has hardly begun with so few.
PREFILL_CPU, PREFILL_GPU = 64, 512


class QueueFull(Exception):  # noqa: N818 (it is the client who hears of it)
    """No more texts can wait."""


@dataclass(frozen=True)
class Piece:
    """What a text has got since the piece before."""

    text: str = ""
    scored: Sequence[Scored] = ()  # of a prompt that is scored, many; of a completion the new token
    finish_reason: str = ""  # as Writer has it; with the last piece
    error: Exception | None = None  # why there will be no more


@dataclass(eq=False)
class Text:
    """One completion that is asked for. ``deliver`` is called with each piece, on the scheduler's thread."""

    prompt: Sequence[int]
    writer: Writer
    chooser: Chooser
    deliver: Callable[[Piece], None]
    client: str = ""
    score_prompt: bool = False  # as the chooser's rules say; then nothing of the prompt is taken from other texts

    # The scheduler's own:
    ids: list[int] = field(init=False)  # prompt and completion; the last one is not run yet
    slot: int = field(default=-1, init=False)
    reused: int = field(default=0, init=False)  # tokens of the prompt that a slot held already
    cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)


@dataclass
class Totals:
    """What a scheduler has done since it began."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0  # one token for every text that runs
    cancelled: int = 0
    failed: int = 0


class Scheduler:
    """Runs texts on a decoder. All methods but ``__init__`` may be called from any thread."""

    def __init__(
        self,
        decoder: Decoder,
        vocab_size: int,
        *,
        slots: int = 8,
        context: int | None = None,
        prefill_tokens: int | None = None,
        queue: int = 256,
        hand_over: Callable[[list[tuple[Text, Piece]]], None] | None = None,
    ) -> None:
        """``hand_over`` is given all pieces of a turn at once; by default each text's ``deliver`` is called.

        ValueError for a ``context`` that is larger than the model's.
        """
        self.capacity = context or decoder.config.max_context_length
        self.totals = Totals()
        self._device, self._vocab_size = decoder.device, vocab_size
        self._prefill_tokens = prefill_tokens or (PREFILL_CPU if self._device.type == "cpu" else PREFILL_GPU)
        self._slots = decoder.slots(slots, self.capacity)
        self._places = Places(self._slots, slots)
        self._hand_over = hand_over or deliver
        self._pieces: list[tuple[Text, Piece]] = []
        self._entering: Text | None = None  # whose prompt is being run
        self._running: list[Text] = []
        self._waiting: FairQueue[Text] = FairQueue(queue)
        self._changed = threading.Condition()  # guards the queue and the wish to end
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    # From other threads

    @property
    def alive(self) -> bool:
        """Whether texts are still run."""
        return self._thread.is_alive() and not self._ending

    @property
    def running(self) -> int:
        """Texts that have a slot."""
        return len(self._running) + (self._entering is not None)

    @property
    def waiting(self) -> int:
        """Texts that have none yet."""
        with self._changed:
            return len(self._waiting)

    def submit(self, texts: Sequence[Text]) -> None:
        """Run some texts of one client. QueueFull where not all of them can wait."""
        with self._changed:
            if not self.alive:
                raise RuntimeError("the scheduler has ended")
            if not self._waiting.put(texts):
                raise QueueFull
            self._changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """Let go of some texts, before their next token. Nothing more is delivered to those that had not finished."""
        with self._changed:
            for text in texts:
                text.cancelled = True
                if self._waiting.remove(text):
                    self.totals.cancelled += 1
            self._changed.notify()

    def close(self) -> None:
        """Run nothing more; what is not finished gets an error."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    # On the scheduler's own thread

    def _run(self) -> None:
        try:
            while self._something_to_do():
                self._let_go()
                self._enter()
                self._advance()
                self._flush()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            self._end()

    def _something_to_do(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._entering or self._running or len(self._waiting))
            return not self._ending

    def _let_go(self) -> None:
        for text in [one for one in (self._entering, *self._running) if one is not None and one.cancelled]:
            self.totals.cancelled += 1
            self._leave(text)

    def _enter(self) -> None:
        """Run as much of the prompts that come in as fits into a turn."""
        room = self._prefill_tokens
        while room > 0:
            text = self._entering or self._next()
            if text is None:
                return
            done = self._slots.length(text.slot)
            # A prompt is cut at the same places whoever else comes in: how a sum is rounded can depend on its piece.
            part = text.prompt[done : (done // self._prefill_tokens + 1) * self._prefill_tokens]
            room -= len(part)
            try:
                scored = self._prefill(text, done, part)
            except Exception as error:  # not enough memory, mostly: this text alone has to do with it
                self._fail(text, error)
                continue
            if scored:
                self._pieces.append((text, Piece(scored=scored)))
            if done + len(part) == len(text.prompt):
                self._entering = None
                if text.slot >= 0:
                    self._running.append(text)

    def _next(self) -> Text | None:
        if not self._places.free:
            return None
        with self._changed:
            text = self._waiting.take()
        if text is None:
            return None
        self._entering = text
        text.slot = self._places.take(text.ids, reuse=not text.score_prompt)
        text.reused = self._slots.length(text.slot)
        self.totals.prompt_tokens += len(text.prompt)
        self.totals.reused_tokens += text.reused
        return text

    def _prefill(self, text: Text, done: int, part: Sequence[int]) -> list[Scored]:
        """Run a part of a prompt, and behind the last one choose the first token; the prompt's scores if wanted."""
        scored: list[Scored] = []
        if text.score_prompt:
            logits_TV = self._slots.verify(text.slot, part)
            predicted = text.prompt[done + 1 : done + len(part) + 1]
            scored = [] if done else [Scored(text.prompt[0], None)]
            if predicted:
                top = text.chooser.rules.logprobs or 0
                scored += score(logits_TV[: len(predicted)], predicted, top, self._vocab_size)
            logits_BV = logits_TV[-1:]
        else:
            logits_BV = self._slots.prefill([text.slot], [part])
        if done + len(part) < len(text.prompt):
            return scored
        if text.writer.finish_reason:  # no token is wanted
            self._pieces.append((text, Piece(scored=scored, finish_reason=text.writer.finish_reason)))
            self._leave(text)
            return []
        if scored:
            self._pieces.append((text, Piece(scored=scored)))
        self._add(text, choose(logits_BV, [text.chooser], self._vocab_size)[0])
        return []

    def _advance(self) -> None:
        """One token of every text that runs."""
        texts = list(self._running)
        if not texts:
            return
        try:
            tokens_B = torch.tensor([text.ids[-1] for text in texts], device=self._device)
            logits_BV = self._slots.decode([text.slot for text in texts], tokens_B)
            chosen = choose(logits_BV, [text.chooser for text in texts], self._vocab_size)
        except Exception as error:
            for text in texts:
                self._fail(text, error)
            return
        self.totals.steps += 1
        for text, token in zip(texts, chosen, strict=True):
            self._add(text, token)

    def _add(self, text: Text, token: Scored) -> None:
        self.totals.completion_tokens += 1
        text.ids.append(token.id)
        words = text.writer.push(token.id)
        self._pieces.append((text, Piece(words, (token,), text.writer.finish_reason)))
        if text.writer.finish_reason:
            self._leave(text)

    def _fail(self, text: Text, error: Exception) -> None:
        if not self.totals.failed:  # the first tells enough
            traceback.print_exception(error)
        self.totals.failed += 1
        self._pieces.append((text, Piece(error=error.with_traceback(None))))  # frames would keep tensors alive
        self._leave(text, broken=True)

    def _leave(self, text: Text, *, broken: bool = False) -> None:
        self._places.give_back(text.slot, broken=broken)
        text.slot = -1
        if text is self._entering:
            self._entering = None
        else:
            self._running.remove(text)

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        pieces = [(text, piece) for text, piece in pieces if not text.cancelled]
        if pieces:
            self._hand_over(pieces)

    def _end(self) -> None:
        """Tell all who still wait for something that nothing more comes."""
        with self._changed:
            self._ending = True
            left = [*self._running, *([self._entering] if self._entering else [])]
            while (text := self._waiting.take()) is not None:
                left.append(text)
        self._running, self._entering = [], None
        self._pieces += [(text, Piece(error=RuntimeError("the scheduler has ended"))) for text in left]
        self._flush()


def deliver(pieces: list[tuple[Text, Piece]]) -> None:
    """Give each piece to its text."""
    for text, piece in pieces:
        text.deliver(piece)
