"""The model that is served: requests are checked, become texts in the scheduler, and answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from openelm.errors import UserError
from openelm.infer.engine import Engine
from openelm.infer.writing import Writer
from openelm.serve.choosing import Chooser
from openelm.serve.errors import Refused
from openelm.serve.guard import Guard, judged
from openelm.serve.jobs import Answer, Job
from openelm.serve.metrics import Metrics
from openelm.serve.replies import ChatForm, CompletionForm, Form, Spelling
from openelm.serve.requests import ChatRequest, CompletionRequest
from openelm.serve.response_format import Formats
from openelm.serve.scheduler import Piece, QueueFull, Scheduler, Text, deliver
from openelm.serve.settings import Settings
from openelm.serve.template import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue: its ids, and its words for an echo and for a guard."""

    ids: list[int]
    text: str


class Service:
    """An engine with its scheduler. ``start`` is called on the event loop that answers are wanted on."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        name: str,
        template: ChatTemplate | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.settings, self.name, self.template = settings, name, template
        self.created = int(time.time())
        self.draining = False
        self._tokenizer, self._guard = engine.tokenizer, guard
        self._vocab_size = engine.tokenizer.vocab_size
        self._longest = max(map(len, engine.tokenizer.backend.pieces))
        self._spelling, self._formats = Spelling(engine.tokenizer), Formats(engine.tokenizer)
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self.scheduler = Scheduler(
                engine.decoder,
                self._vocab_size,
                slots=settings.slots,
                context=settings.context,
                prefill_tokens=settings.prefill_tokens,
                queue=settings.queue,
                hand_over=self._hand_over,
            )
        except ValueError as error:
            raise UserError(f"--context {settings.context}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"there is no memory for {settings.slots} texts ({str(error).splitlines()[0]}): take fewer --slots, or "
                "a smaller --context"
            ) from error
        self.limit = self.scheduler.capacity
        self.metrics = Metrics(self.scheduler)

    def start(self) -> None:
        """Let pieces come to the event loop that runs."""
        self._loop = asyncio.get_running_loop()

    @property
    def healthy(self) -> bool:
        """Whether new requests are answered."""
        return self.scheduler.alive and not self.draining

    async def complete(self, ask: CompletionRequest, client: str, keep: Callable[[Job], None]) -> Answer:
        """Begin with completions. ``keep`` is told of the job before anything runs: who has it must cancel it."""
        self._check(ask)
        prompts = [await asyncio.to_thread(self._encoded, prompt) for prompt in ask.prompts()]
        echoed = [prompt.text for prompt in prompts for _ in range(ask.n or 1)] if ask.echo else None
        form = CompletionForm(self.name, ask.logprobs is not None, self._spelling, echoed)
        most = 16 if ask.max_tokens is None else ask.max_tokens
        return await self._begin(ask, prompts, most, form, client, keep)

    async def chat(self, ask: ChatRequest, client: str, keep: Callable[[Job], None]) -> Answer:
        """Begin with a chat's next turn; ``keep`` as in ``complete``."""
        self._check(ask)
        if self.template is None:
            raise Refused(
                400, f"{self.name} has no chat template: it is a base model; use /v1/completions", code="no_template"
            )
        messages = [message.plain() for message in ask.messages]
        self._check_length(sum(len(message["content"]) for message in messages))
        ids = await asyncio.to_thread(self.template.encode, messages)  # UserError: it does not take this conversation
        form = ChatForm(self.name, ask.counts() is not None, self._spelling)
        most = ask.max_completion_tokens if ask.max_completion_tokens is not None else ask.max_tokens
        prompt = Prompt(self._fitting(ids), "\n".join(message["content"] for message in messages))
        return await self._begin(ask, [prompt], self.limit if most is None else most, form, client, keep)

    async def _begin(
        self,
        ask: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        most: int,
        form: Form,
        client: str,
        keep: Callable[[Job], None],
    ) -> Answer:
        job = Job(len(prompts), self.scheduler.cancel, self.settings.request_s)
        keep(job)
        words = "\n".join(prompt.text for prompt in prompts)
        unsafe = self._guard is not None and await judged(self._guard, words, "")
        for text in await asyncio.to_thread(self._texts, ask, prompts, 0 if unsafe else most, job, client):
            job.add(text)
        if unsafe:
            for index in range(len(job.texts)):
                job.put(index, Piece(finish_reason="content_filter"))
        else:
            self._submit(job)
        return Answer(job, form, self.metrics, self._guard, words)

    def _submit(self, job: Job) -> None:
        try:
            self.scheduler.submit(job.texts)
        except QueueFull:
            raise Refused(
                429,
                f"the queue has no room for {len(job.texts)} more texts: ask again in a moment",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except RuntimeError as error:
            raise Refused(503, "the server is ending: ask another", code="shutting_down") from error

    def _texts(
        self, ask: CompletionRequest | ChatRequest, prompts: Sequence[Prompt], most: int, job: Job, client: str
    ) -> list[Text]:
        """The texts of a request, prompt by prompt, each with its samples."""
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        scored = isinstance(ask, CompletionRequest) and bool(ask.echo) and ask.logprobs is not None
        wanted = ask.response_format if isinstance(ask, ChatRequest) else None
        texts: list[Text] = []
        for prompt in prompts:
            for sample in range(ask.n or 1):
                # A prompt that fills the context has room for one token behind it, which is chosen and never run.
                room = min(most, max(1, self.limit - len(prompt.ids)))
                rules = ask.rules(seed + sample, self._vocab_size)
                chooser = Chooser(rules, prompt.ids, self._vocab_size, self._formats.grammar(wanted))
                text = Text(
                    prompt.ids,
                    Writer(self._tokenizer, prompt.ids, room, ask.stops()),
                    chooser,
                    partial(job.put, len(texts)),
                    client,
                    score_prompt=scored,
                )
                texts.append(text)
        return texts

    def _check(self, ask: CompletionRequest | ChatRequest) -> None:
        """Refused for what the model does not have, or the server's limits forbid."""
        if ask.model not in (None, self.name):
            raise Refused(
                404, f"there is no model {ask.model}: {self.name} is served", param="model", code="model_not_found"
            )
        limits, stops = self.settings, ask.stops()
        if len(stops) > limits.stops or not all(0 < len(stop) <= limits.stop_characters for stop in stops):
            raise Refused(
                400,
                f"stop: {limits.stops} texts at most, of 1 to {limits.stop_characters} characters each",
                param="stop",
            )
        prompts = len(ask.prompts()) if isinstance(ask, CompletionRequest) else 1
        if prompts * (ask.n or 1) > limits.texts:
            raise Refused(
                400,
                f"{prompts} prompts with n={ask.n or 1} are {prompts * (ask.n or 1)} texts: {limits.texts} at most",
                param="n",
            )
        if isinstance(ask, ChatRequest) and ask.top_logprobs is not None and not ask.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: set it to true", param="top_logprobs")

    def _encoded(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            self._check_length(len(prompt))
            return Prompt(self._fitting([self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]), prompt)
        outside = next((id for id in prompt if id >= self._vocab_size), None)
        if outside is not None:
            raise Refused(
                400, f"token {outside} is not in the vocabulary of {self._vocab_size}: give others", param="prompt"
            )
        return Prompt(self._fitting(prompt), self._tokenizer.decode(prompt))

    def _check_length(self, characters: int) -> None:
        """Refused, before it is cut into tokens, for a text that cannot fit."""
        if characters > self._longest * self.limit:
            raise self._too_long(f"{characters} characters")

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) > self.limit:
            raise self._too_long(f"{len(ids)} tokens")
        return ids

    def _too_long(self, size: str) -> Refused:
        message = f"the prompt has {size}, the context only {self.limit} tokens: shorten it"
        return Refused(400, message, code="context_length_exceeded")

    def _hand_over(self, pieces: list[tuple[Text, Piece]]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver, pieces)
