"""Text from a model: prompts in, text out, streamed, stopped and batched; which engine computes, and on what.

The computation is that of slots.py, by torch or by the CPU decoder in C++.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.infer import native
from openelm.infer.sampling import Sampling
from openelm.infer.slots import Decoder, Slots
from openelm.infer.speculative import Speculation
from openelm.infer.texts import Texts, common_prefix
from openelm.infer.torch_decoder import TorchDecoder
from openelm.infer.writing import Writer, checked_stops
from openelm.model.folder import find_model_folder, load_config, load_model
from openelm.model.transformer import OpenELM

GREEDY = Sampling()
Backend = Literal["auto", "torch", "native"]


@dataclass(frozen=True)
class Completion:
    """What the model added to one prompt; ``ids`` include the end of text where it was reached."""

    text: str
    ids: list[int]
    finish_reason: str  # "stop": end of text or a stop string; "length": max_new_tokens or the context is full


class Engine:
    """A model and its tokenizer, ready to write text."""

    def __init__(self, model: OpenELM | Decoder, tokenizer: Tokenizer) -> None:
        self.decoder: Decoder = TorchDecoder(model) if isinstance(model, OpenELM) else model
        if tokenizer.vocab_size > self.decoder.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only "
                f"{self.decoder.config.vocab_size}: they do not belong together"
            )
        self.tokenizer = tokenizer
        self._kept: tuple[Slots, list[int]] | None = None  # of the last stream, and what its slot holds

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        tokenizer: str | Path | None = None,
        backend: Backend = "torch",
        threads: int | None = None,
        compile: bool = False,
    ) -> Engine:
        """Open a model folder, or the ``model/`` of a run folder; ``tokenizer`` for one that holds none.

        By default on the fastest device here, in the dtype of the weights where that device computes in it. ``backend``
        "native" is the CPU decoder (native.py), which computes with bf16 or quantised weights and has no scores but
        logits; "auto" takes it on a CPU where it is built and no other dtype is asked for. ``compile`` is torch's.
        """
        folder = find_model_folder(Path(folder))
        device = checked_device("cpu" if device is None and backend == "native" else device)
        words = Tokenizer.load(tokenizer or folder)
        fits = device.type == "cpu" and dtype in (None, torch.bfloat16) and not compile
        if backend == "native" and not fits:
            asked = f"{str(dtype or 'its own dtype').removeprefix('torch.')} on {device}"
            raise UserError(
                f"the native backend computes in bfloat16 on the CPU; {asked}{', compiled,' * compile} is for torch"
            )
        config, stored = load_config(folder)
        if backend == "native" or (backend == "auto" and fits and native.available() and native.computes(config)):
            return cls(native.NativeModel.load(folder, threads=threads), words)
        if threads is not None:
            torch.set_num_threads(threads)
        dtype = native_dtype(stored, device) if dtype is None else dtype
        return cls(TorchDecoder(load_model(folder, dtype=dtype, device=device), compile=compile), words)

    @property
    def model(self) -> OpenELM:
        """The model itself, for those who score with it: the torch backend has one."""
        assert isinstance(self.decoder, TorchDecoder), "the CPU decoder holds no torch model: load with backend='torch'"
        return self.decoder.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.device

    @property
    def limit(self) -> int:
        """Tokens of the model's context."""
        return self.decoder.config.max_context_length

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        *,
        add_bos: bool = True,
        slide: bool = False,
        speculation: Speculation | None = None,
    ) -> Stream:
        """Continue one prompt: iterate over the result for pieces of text as they complete.

        With ``add_bos`` the prompt is given a BOS unless it begins with one. It ends at the end of text, before the
        first ``stop`` string, after ``max_new_tokens``, or when prompt and completion fill the model's context. With
        ``slide`` it goes on there, with its first token and the later half of the context. Raises UserError, before
        anything is computed, for a prompt longer than the context. What it has in common with the stream before is not
        computed again. With ``speculation`` tokens are drafted for it: the text is the same.
        """
        if slide and speculation is not None:
            raise UserError("drafts need the whole text in the window: leave the sliding window out, or the drafts")
        prompt = self._checked_prompt(prompt_ids, add_bos, slide)
        writer = Writer(self.tokenizer, prompt, self._room(prompt, max_new_tokens, slide), checked_stops(stop))
        return Stream(writer, self._steps(prompt, writer.room, sampling, slide, speculation), len(prompt))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        *,
        seeds: Sequence[int] | None = None,
        add_bos: bool = True,
        slide: bool = False,
    ) -> list[Completion]:
        """Continue several prompts at once, each as ``stream`` would alone.

        ``seeds``, one a prompt, replace ``sampling.seed``: give different ones for different samples of one prompt.
        """
        if not prompts:
            return []
        seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or none")
        rows = [self._checked_prompt(ids, add_bos, slide) for ids in prompts]
        stops = checked_stops(stop)
        writers = [Writer(self.tokenizer, row, self._room(row, max_new_tokens, slide), stops) for row in rows]
        pieces = [""] * len(rows)
        going = [row for row, writer in enumerate(writers) if not writer.finish_reason]
        if going:
            slots = self.decoder.slots(len(rows), self._capacity(rows, max(writer.room for writer in writers)))
            texts = self._texts(slots, rows, sampling, seeds, slide)
        while going:
            for row, id in zip(going, texts.step(going), strict=True):
                pieces[row] += writers[row].push(id)
            going = [row for row in going if not writers[row].finish_reason]
        return [
            Completion(text, writer.ids, writer.finish_reason) for text, writer in zip(pieces, writers, strict=True)
        ]

    def _steps(
        self, prompt: list[int], steps: int, sampling: Sampling, slide: bool, speculation: Speculation | None
    ) -> Generator[list[int]]:
        """The next ``steps`` tokens of one prompt, one at a time or, where they are drafted, some."""
        if steps < 1:
            return
        needed = self._capacity([prompt], steps)
        kept, self._kept = self._kept, None
        if kept is None or kept[0].capacity < needed:
            # Room for what may follow it: a conversation grows.
            kept = self.decoder.slots(1, min(self.limit, max(256, 1 << (needed - 1).bit_length()))), []
        slots, held = kept
        # A prompt that is longer than a slot begins elsewhere (Texts), and has nothing in common with what is held.
        common = common_prefix([prompt, [*held, -1]]) if len(prompt) <= slots.capacity else 0
        slots.truncate(0, min(slots.length(0), common))
        if speculation is not None:
            yield from self._drafted(speculation, slots, prompt, steps, sampling)
            return
        texts = self._texts(slots, [prompt], sampling, [sampling.seed], slide)
        try:
            for _ in range(steps):
                yield texts.step([0])
        finally:
            self._kept = slots, texts.held()

    def _drafted(
        self, speculation: Speculation, slots: Slots, prompt: list[int], steps: int, sampling: Sampling
    ) -> Generator[list[int]]:
        """The same, as speculative.py has it."""
        text = list(prompt)
        logits_1V = slots.prefill([0], [text[slots.length(0) :]])
        try:
            yield from speculation.steps(slots, 0, logits_1V[0], text, steps, sampling, self.tokenizer.vocab_size)
        finally:
            self._kept = slots, text[: slots.length(0)]

    def _texts(
        self, slots: Slots, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int], slide: bool
    ) -> Texts:
        vocab_size = self.tokenizer.vocab_size
        return Texts(slots, prompts, sampling, seeds, vocab_size=vocab_size, device=self.device, slide=slide)

    def _capacity(self, prompts: list[list[int]], steps: int) -> int:
        return min(self.limit, max(map(len, prompts)) + steps - 1)

    def _checked_prompt(self, ids: Sequence[int], add_bos: bool, slide: bool) -> list[int]:
        prompt, vocabulary = list(ids), self.tokenizer.vocab_size
        if add_bos and prompt[:1] != [self.tokenizer.bos_id]:
            prompt = [self.tokenizer.bos_id, *prompt]
        if not prompt:
            raise UserError("the prompt has no token: give text, or let a BOS begin it")
        outside = next((id for id in prompt if not 0 <= id < vocabulary), None)
        if outside is not None:
            raise UserError(f"token id {outside} in the prompt is outside the vocabulary of {vocabulary}")
        if len(prompt) > self.limit and not slide:
            raise UserError(
                f"the prompt has {len(prompt)} tokens (BOS counted), the model's context only {self.limit}: "
                "shorten it, or let the window slide"
            )
        return prompt

    def _room(self, prompt: list[int], max_new_tokens: int, slide: bool) -> int:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        return max_new_tokens if slide else min(max_new_tokens, self.limit - len(prompt))


class Stream:
    """A completion being written: an iterator over its text. Stop iterating, or call ``close``, to cancel."""

    def __init__(self, writer: Writer, steps: Generator[list[int]], prompt_tokens: int) -> None:
        self._writer, self._steps = writer, steps
        self._pieces = self._write()
        self.prompt_tokens = prompt_tokens
        self.prefill_s = 0.0  # prompt and first token
        self.decode_s = 0.0  # all further tokens; the time that the reader takes is not counted

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Compute nothing more, and let go of the cache."""
        self._pieces.close()
        self._steps.close()

    @property
    def ids(self) -> list[int]:
        """Tokens chosen so far, the end of text included."""
        return self._writer.ids

    @property
    def finish_reason(self) -> str:
        """As in Completion; "" while more may come."""
        return self._writer.finish_reason

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed after the first token; None where there was no other."""
        return (len(self.ids) - 1) / self.decode_s if self.decode_s else None

    def _write(self) -> Generator[str]:
        while not self._writer.finish_reason:
            start_s = time.perf_counter()
            chosen = next(self._steps)
            elapsed_s = time.perf_counter() - start_s
            if self.ids:
                self.decode_s += elapsed_s
            else:
                self.prefill_s = elapsed_s
            for id in chosen:
                if text := self._writer.push(id):
                    yield text
                if self._writer.finish_reason:
                    break
        self._steps.close()


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device named, tried out; without a name CUDA, Apple's GPU or the CPU, the first that is there."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(device)!r} cannot be used ({reason}): try cpu") from error
    return device


def native_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or fp32 where it is a 16 bit one that this CPU has no instructions for.

    Such products are emulated, element by element; on the machine where this was found, 500 times slower.
    """
    tests = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device.type != "cpu" or dtype not in tests:
        return dtype
    supported = getattr(torch.ops.mkldnn, tests[dtype], None)  # not in every build of torch
    if supported is not None and supported():
        return dtype
    _say_once(f"this CPU does not compute in {str(dtype).removeprefix('torch.')}: the weights are taken as float32")
    return torch.float32


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)
