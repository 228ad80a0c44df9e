"""Text from a model: prefill, decode, and around them the loop that streams, stops and batches.

Shapes: B sequences, T tokens of the longest prompt, S columns of the cache in use, V vocabulary.

Prompts of different lengths are padded on the left, so that all sequences grow in the same column; a row's first
``pads_B`` columns are padding, and its positions count from the first real token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.data.tokenizer import StreamDecoder, Tokenizer
from openelm.errors import UserError
from openelm.infer.sampling import Sampling, next_tokens
from openelm.model.cache import Cache
from openelm.model.folder import find_model_folder, load_config, load_model
from openelm.model.transformer import OpenELM

GREEDY = Sampling()


@torch.inference_mode()
def prefill(model: OpenELM, tokens_BT: Tensor, cache: Cache, pads_B: Tensor | None = None) -> Tensor:
    """Run whole prompts, put their keys and values behind those in ``cache``; logits (B, V) after the last token."""
    past, T = cache.length, tokens_BT.shape[1]
    positions = mask = None
    if pads_B is not None:
        columns_T = torch.arange(past, past + T, device=tokens_BT.device)
        keys_S = torch.arange(past + T, device=tokens_BT.device)
        positions = (columns_T - pads_B[:, None]).clamp(min=0)
        mask_BTS = (keys_S <= columns_T[:, None]) & (keys_S >= pads_B[:, None, None])
        # Padding attends to itself: a row of attention over nothing at all would be 0 / 0.
        mask = (mask_BTS | (keys_S == columns_T[:, None]))[:, None]
    return _run(model, tokens_BT, cache, positions, mask)


@torch.inference_mode()
def decode(model: OpenELM, tokens_B: Tensor, cache: Cache, pads_B: Tensor | None = None) -> Tensor:
    """Run one more token of each sequence; logits (B, V) after it."""
    positions = mask = None
    if pads_B is not None:
        positions = cache.length - pads_B[:, None]
        keys_S = torch.arange(cache.length + 1, device=tokens_B.device)
        mask = (keys_S >= pads_B[:, None])[:, None, None]
    return _run(model, tokens_B[:, None], cache, positions, mask)


def _run(model: OpenELM, tokens_BT: Tensor, cache: Cache, positions: Tensor | None, mask: Tensor | None) -> Tensor:
    hidden_BTD = model.hidden(tokens_BT, positions=positions, mask=mask, cache=cache)
    cache.length += tokens_BT.shape[1]
    return F.linear(hidden_BTD[:, -1], model.output_weight)


@dataclass(frozen=True)
class Completion:
    """What the model added to one prompt; ``ids`` include the end of text where it was reached."""

    text: str
    ids: list[int]
    finish_reason: str  # "stop": end of text or a stop string; "length": max_new_tokens or the context is full


class Engine:
    """A model and its tokenizer, ready to write text."""

    def __init__(self, model: OpenELM, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only "
                f"{model.config.vocab_size}: they do not belong together"
            )
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        tokenizer: str | Path | None = None,
    ) -> Engine:
        """Open a model folder, or the ``model/`` of a run folder; ``tokenizer`` for one that holds none.

        By default on the fastest device here, in the dtype of the weights where that device computes in it.
        """
        folder = find_model_folder(Path(folder))
        device = checked_device(device)
        words = Tokenizer.load(tokenizer or folder)
        if dtype is None:
            dtype = native_dtype(load_config(folder)[1], device)
        return cls(load_model(folder, dtype=dtype, device=device), words)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.token_embeddings.weight.device

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        *,
        add_bos: bool = True,
    ) -> Stream:
        """Continue one prompt: iterate over the result for pieces of text as they complete.

        With ``add_bos`` the prompt is given a BOS unless it begins with one. It ends at the end of text, before the
        first ``stop`` string, after ``max_new_tokens``, or when prompt and completion fill the model's context. Raises
        UserError, before anything is computed, for a prompt longer than the context.
        """
        prompt = self._checked_prompt(prompt_ids, add_bos)
        writer = _Writer(self.tokenizer, prompt, self._room(prompt, max_new_tokens), checked_stops(stop))
        steps = self._steps([prompt], writer.room, sampling, [sampling.seed])
        return Stream(writer, steps, len(prompt))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        *,
        seeds: Sequence[int] | None = None,
        add_bos: bool = True,
    ) -> list[Completion]:
        """Continue several prompts at once, each as ``stream`` would alone.

        ``seeds``, one a prompt, replace ``sampling.seed``: give different ones for different samples of one prompt.
        """
        if not prompts:
            return []
        seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each, or none")
        rows = [self._checked_prompt(ids, add_bos) for ids in prompts]
        stops = checked_stops(stop)
        writers = [_Writer(self.tokenizer, row, self._room(row, max_new_tokens), stops) for row in rows]
        texts = [""] * len(rows)
        for ids in self._steps(rows, max(writer.room for writer in writers), sampling, seeds):
            for index, (writer, id) in enumerate(zip(writers, ids, strict=True)):
                if not writer.finish_reason:
                    texts[index] += writer.push(id)
            if all(writer.finish_reason for writer in writers):
                break
        return [Completion(text, writer.ids, writer.finish_reason) for text, writer in zip(texts, writers, strict=True)]

    def _steps(
        self, prompts: list[list[int]], steps: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Generator[list[int]]:
        """The next token id of every prompt, ``steps`` times; whoever iterates decides who has finished."""
        if steps < 1:
            return
        device, model = self.device, self.model
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        lengths_B = torch.tensor(lengths, device=device)
        pads_B = longest - lengths_B if min(lengths) < longest else None
        # Samples of one prompt have its keys and values in common, which are computed once.
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which_B = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
        # A row is filled up with its own first token: padding then adds nothing to the tokens it has seen.
        rows = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in places]
        tokens_UT = torch.tensor(rows, device=device)
        pads_U = None if pads_B is None else longest - torch.tensor([len(prompt) for prompt in places], device=device)
        seeds_B = torch.tensor(seeds, dtype=torch.int64, device=device)
        # An embedding is often wider than the vocabulary; what only fills it up is never chosen.
        V = self.tokenizer.vocab_size
        seen_BV = None
        if sampling.repetition_penalty != 1:
            seen_BV = torch.zeros(len(prompts), V, dtype=torch.bool, device=device)
            seen_BV.scatter_(1, tokens_UT[which_B], True)
        dtype = model.output_weight.dtype
        kv = Cache(model.config, len(rows), longest + steps - 1, dtype=dtype, device=device)
        logits_BV = prefill(model, tokens_UT, kv, pads_U)[which_B]
        if len(rows) < len(prompts):
            kv = kv.repeated(which_B)
        for step in range(steps):
            tokens_B = next_tokens(
                logits_BV[:, :V], sampling, seeds_B=seeds_B, positions_B=lengths_B + step, seen_BV=seen_BV
            )
            if seen_BV is not None:
                seen_BV.scatter_(1, tokens_B[:, None], True)
            yield tokens_B.tolist()
            if step + 1 < steps:
                logits_BV = decode(model, tokens_B, kv, pads_B)

    def _checked_prompt(self, ids: Sequence[int], add_bos: bool) -> list[int]:
        prompt, vocabulary = list(ids), self.tokenizer.vocab_size
        if add_bos and prompt[:1] != [self.tokenizer.bos_id]:
            prompt = [self.tokenizer.bos_id, *prompt]
        if not prompt:
            raise UserError("the prompt has no token: give text, or let a BOS begin it")
        outside = next((id for id in prompt if not 0 <= id < vocabulary), None)
        if outside is not None:
            raise UserError(f"token id {outside} in the prompt is outside the vocabulary of {vocabulary}")
        limit = self.model.config.max_context_length
        if len(prompt) > limit:
            raise UserError(
                f"the prompt has {len(prompt)} tokens (BOS counted), the model's context only {limit}: shorten it"
            )
        return prompt

    def _room(self, prompt: list[int], max_new_tokens: int) -> int:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        return min(max_new_tokens, self.model.config.max_context_length - len(prompt))


class Stream:
    """A completion being written: an iterator over its text. Stop iterating, or call ``close``, to cancel."""

    def __init__(self, writer: _Writer, steps: Generator[list[int]], prompt_tokens: int) -> None:
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
            (id,) = next(self._steps)
            elapsed_s = time.perf_counter() - start_s
            if self.ids:
                self.decode_s += elapsed_s
            else:
                self.prefill_s = elapsed_s
            if text := self._writer.push(id):
                yield text
        self._steps.close()


class _Writer:
    """Turns the ids of one sequence into text that may be given out, and knows when it is finished."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], room: int, stops: tuple[str, ...]) -> None:
        self.room = room
        self.ids: list[int] = []
        self.finish_reason = "" if room > 0 else "length"
        self._eos_id = tokenizer.eos_id
        self._held = StopFilter(stops)
        self._decoder = StreamDecoder(tokenizer)
        for id in prompt:  # so that the space before the first new word stays
            self._decoder.push(id)

    def push(self, id: int) -> str:
        """The text that is certain once ``id`` has followed."""
        self.ids.append(id)
        if id == self._eos_id:
            self.finish_reason = "stop"
            text = self._held.push(self._decoder.flush())
            return text + self._held.flush()
        text = self._held.push(self._decoder.push(id))
        if self._held.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.room:
            text += self._held.push(self._decoder.flush())
            self.finish_reason = "stop" if self._held.stopped else "length"
            text += self._held.flush()
        return text


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    First is the one that is complete first: so it does not matter how the text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What may be given out after ``piece``; nothing any more once ``stopped``."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; a single string and an empty stop are refused."""
    if isinstance(stops, str) or not all(stops):
        raise UserError(f"stop={stops!r} must be a list of strings that are not empty")
    return tuple(stops)


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
