"""A request on its way: its texts in the scheduler, their pieces on the event loop, and the answer made of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from openelm.serve.choosing import Scored
from openelm.serve.errors import Refused, as_json
from openelm.serve.guard import Guard, judged
from openelm.serve.metrics import Metrics
from openelm.serve.replies import Form, usage
from openelm.serve.scheduler import Piece, Text

GUARDED_CHARACTERS = 100  # of an answer between two looks of a guard, which sees each character before a client does


class Job:
    """The texts of one request. Pieces come by ``put``, on the event loop; ``cancel`` lets go of what still runs."""

    def __init__(self, prompts: int, cancel: Callable[[Sequence[Text]], None], timeout_s: float) -> None:
        """``prompts``: how many there are; the texts, of each prompt equally many, are set before they are run."""
        self.texts: list[Text] = []
        self._prompts, self._cancel, self._timeout_s = prompts, cancel, timeout_s
        self._end_s = asyncio.get_running_loop().time() + timeout_s
        # Bounded by what the texts may hold: a slow reader cannot make it grow.
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._going: set[int] = set()

    def add(self, text: Text) -> None:
        """One more text."""
        self._going.add(len(self.texts))
        self.texts.append(text)

    def put(self, index: int, piece: Piece) -> None:
        """A piece of text number ``index``."""
        self._pieces.put_nowait((index, piece))

    def cancel(self) -> None:
        """Let go of what still runs."""
        if self._going:
            self._cancel([self.texts[index] for index in self._going])
            self._going.clear()

    def drop(self, index: int) -> None:
        """Let go of one text."""
        self._cancel([self.texts[index]])
        self._going.discard(index)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """All pieces, as they come. Refused where one is an error, or the time is over."""
        while self._going:
            try:
                async with asyncio.timeout_at(self._end_s):
                    index, piece = await self._pieces.get()
            except TimeoutError as error:
                message = f"the answer was not finished in {self._timeout_s:g} s: ask for fewer tokens, or again later"
                raise Refused(408, message, code="timeout") from error
            if index not in self._going:
                continue  # dropped; this was on its way
            if piece.error is not None:
                raise _failed(piece.error)
            if piece.finish_reason:
                self._going.discard(index)
            yield index, piece

    def usage(self) -> dict[str, object]:
        """The account; a prompt of several samples counts once."""
        samples = max(1, len(self.texts) // self._prompts)
        firsts = self.texts[::samples]
        return usage(
            sum(len(text.prompt) for text in firsts),
            sum(len(text.writer.ids) for text in self.texts),
            sum(text.reused for text in firsts),
        )


def _failed(error: Exception) -> Refused:
    memory = isinstance(error, MemoryError) or "memory" in str(error).lower()
    if memory:
        return Refused(503, "there was not enough memory for this request: send less, or again later", code="memory")
    return Refused(503, "this request could not be computed: see the server's own output", code="not_computed")


class Answer:
    """A job's pieces as OpenAI's objects; a guard sees each text before it is given out."""

    def __init__(self, job: Job, form: Form, metrics: Metrics, guard: Guard | None = None, prompt: str = "") -> None:
        self._job, self._form, self._metrics, self._guard, self._prompt = job, form, metrics, guard, prompt
        self._start_s = time.perf_counter()

    async def whole(self) -> dict[str, object]:
        """The answer at once."""
        texts = [""] * len(self._job.texts)
        scored: list[list[Scored]] = [[] for _ in texts]
        reasons = [""] * len(texts)
        async for index, piece in self._checked():
            texts[index] += piece.text
            scored[index] += piece.scored
            reasons[index] = piece.finish_reason
        choices = [self._form.whole(index, texts[index], scored[index], reasons[index]) for index in range(len(texts))]
        return {**self._form.envelope(chunk=False), "choices": choices, "usage": self._job.usage()}

    async def events(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        """The answer as server-sent events; what goes wrong behind the first is the last of them."""
        opened: set[int] = set()
        try:
            async for index, piece in self._checked():
                choices = [] if index in opened else self._form.opening(index)
                opened.add(index)
                if piece.text or piece.scored:
                    choices.append(self._form.part(index, piece.text, piece.scored))
                if piece.finish_reason:
                    choices.append(self._form.end(index, piece.finish_reason))
                for choice in choices:
                    yield self._event(choice, include_usage)
            if include_usage:
                yield _event({**self._form.envelope(chunk=True), "choices": [], "usage": self._job.usage()})
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            if not opened:
                raise
            yield _event(refused.body)

    def _event(self, choice: dict[str, object], include_usage: bool) -> bytes:
        chunk = {**self._form.envelope(chunk=True), "choices": [choice]}
        return _event({**chunk, "usage": None} if include_usage else chunk)

    async def _checked(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces that may be seen."""
        last_s: dict[int, float] = {}
        held = [_Held() for _ in self._job.texts]
        async for index, piece in self._job.pieces():
            self._clock(index, last_s)
            if self._guard is None:
                yield index, self._without_ids(piece)
                continue
            released = await held[index].add(piece, self._guard, self._prompt)
            if released is None:
                self._job.drop(index)
                yield index, Piece(finish_reason="content_filter")
            elif released.text or released.scored or released.finish_reason:
                yield index, self._without_ids(released)

    def _without_ids(self, piece: Piece) -> Piece:
        """A piece with scores only where they were asked for."""
        return piece if self._form.scores else replace(piece, scored=())

    def _clock(self, index: int, last_s: dict[int, float]) -> None:
        now_s = time.perf_counter()
        if index in last_s:
            self._metrics.token_s.observe(now_s - last_s[index])
        else:
            self._metrics.first_token_s.observe(now_s - self._start_s)
        last_s[index] = now_s


class _Held:
    """What a guard has not seen yet of one text."""

    def __init__(self) -> None:
        self._shown, self._piece = "", Piece()

    async def add(self, piece: Piece, guard: Guard, prompt: str) -> Piece | None:
        """What may be seen now; None where nothing more may."""
        waiting = self._piece
        self._piece = Piece(waiting.text + piece.text, [*waiting.scored, *piece.scored], piece.finish_reason)
        if len(self._piece.text) < GUARDED_CHARACTERS and not piece.finish_reason:
            return Piece()
        self._shown += self._piece.text
        if await judged(guard, prompt, self._shown):
            return None
        released, self._piece = self._piece, Piece()
        return released


def _event(value: Mapping[str, object]) -> bytes:
    return b"data: " + as_json(value) + b"\n\n"
