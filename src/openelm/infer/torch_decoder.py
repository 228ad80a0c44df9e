"""The slots of slots.py on torch: any device, any dtype; on CUDA a decoding step is one graph.

Shapes: B slots, T tokens of the longest prompt, S columns of the cache, V vocabulary; G, K as in transformer.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.model.cache import Cache
from openelm.model.transformer import OpenELM

GRAPH_WARMUP = 3  # runs before a graph is recorded: libraries set themselves up in the first ones


class TorchDecoder:
    """A model on torch; ``compile`` fuses its decoding step, which takes a minute at the first token."""

    def __init__(self, model: OpenELM, *, compile: bool = False) -> None:
        self.model, self.compile = model, compile and has_compiler()
        self.config = model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.token_embeddings.weight.device

    @property
    def description(self) -> str:
        """As Decoder has it."""
        dtype = str(self.model.output_weight.dtype).removeprefix("torch.")
        return f"torch on {self.device}{', compiled' if self.compile else ''}, {dtype}"

    def slots(self, count: int, capacity: int) -> TorchSlots:
        """As Decoder has it."""
        limit = self.config.max_context_length
        if not 1 <= capacity <= limit:
            raise ValueError(f"a capacity of {capacity} tokens: the model's context allows 1 to {limit}")
        return TorchSlots(self.model, count, capacity, self.compile)


class TorchSlots:
    """One cache, whose rows are the slots; each has a length of its own."""

    def __init__(self, model: OpenELM, count: int, capacity: int, compile: bool) -> None:
        weight = model.output_weight
        self.capacity = capacity
        self._model = model
        # A column more than texts have: in a graph, slots that are full write there.
        self._rows = Cache(model.config, count, capacity + 1, dtype=weight.dtype, device=weight.device)
        self._lengths = [0] * count
        self._step = _Step(model, self._rows, compile) if weight.is_cuda or compile else None

    def length(self, slot: int) -> int:
        """As Slots has it, like all that follow."""
        return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        if not 0 <= length <= self._lengths[slot]:
            raise ValueError(f"slot {slot} holds {self._lengths[slot]} tokens: it cannot be cut to {length}")
        self._lengths[slot] = length

    def copy(self, source: int, target: int) -> None:
        used = self._lengths[target] = self._lengths[source]
        for tensor in (*self._rows.keys, *self._rows.values):
            tensor[target, :, :used] = tensor[source, :, :used]

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        for slot, prompt in zip(slots, prompts, strict=True):
            self._check(slot, prompt)
        if len(slots) > 1 and len({self._lengths[slot] for slot in slots}) == 1:
            return self._prefill_together(slots, prompts)
        rows = [self._run(slot, prompt)[-1:] for slot, prompt in zip(slots, prompts, strict=True)]
        return F.linear(torch.cat(rows), self._model.output_weight)

    @torch.inference_mode()
    def verify(self, slot: int, ids: Sequence[int]) -> Tensor:
        self._check(slot, ids)
        return F.linear(self._run(slot, ids), self._model.output_weight)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens_B: Tensor) -> Tensor:
        for slot in slots:
            self._check(slot, (0,))
        if self._step is not None:
            hidden_BD = self._step(slots, tokens_B, self._lengths)
        else:
            hidden_BD = self._decode(slots, tokens_B)
        for slot in slots:
            self._lengths[slot] += 1
        return F.linear(hidden_BD, self._model.output_weight)

    def _decode(self, slots: Sequence[int], tokens_B: Tensor) -> Tensor:
        lengths = [self._lengths[slot] for slot in slots]
        if list(slots) == list(range(len(self._lengths))) and len(set(lengths)) == 1:
            self._rows.length = lengths[0]
            return self._model.hidden(tokens_B[:, None], cache=self._rows)[:, 0]
        columns_B = torch.tensor(lengths, device=tokens_B.device)
        rows_B = torch.tensor(slots, device=tokens_B.device)
        return _decode_uneven(self._model, tokens_B, _Uneven(self._rows, rows_B, columns_B, max(lengths) + 1))

    def _run(self, slot: int, ids: Sequence[int]) -> Tensor:
        """One slot's states (T, D) of some more tokens."""
        one = self._rows.part(slice(slot, slot + 1))
        one.length = self._lengths[slot]
        hidden_1TD = self._model.hidden(torch.tensor([ids], device=self._rows.keys[0].device), cache=one)
        self._lengths[slot] += len(ids)
        return hidden_1TD[0]

    def _prefill_together(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts behind texts of one length: filled up on the right, where no token of a prompt looks."""
        device, past = self._rows.keys[0].device, self._lengths[slots[0]]
        T = min(max(map(len, prompts)), self.capacity - past)
        tokens_BT = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=device)
        rows_B = torch.tensor(slots, device=device)
        part = self._rows.part(rows_B)
        part.length = past
        hidden_BTD = self._model.hidden(tokens_BT, cache=part)
        for whole, new in zip((*self._rows.keys, *self._rows.values), (*part.keys, *part.values), strict=True):
            whole[rows_B, :, past : past + T] = new[:, :, past : past + T]
        for slot, prompt in zip(slots, prompts, strict=True):
            self._lengths[slot] += len(prompt)
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        return F.linear(hidden_BTD[torch.arange(len(slots), device=device), last_B], self._model.output_weight)

    def _check(self, slot: int, ids: Sequence[int]) -> None:
        held, vocabulary = self._lengths[slot], self._model.config.vocab_size
        if not ids:
            raise ValueError("there is no token to run")
        if held + len(ids) > self.capacity:
            raise ValueError(f"{len(ids)} tokens behind {held} are more than the capacity of {self.capacity}")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(f"a token id of {min(ids)} to {max(ids)} is outside the vocabulary of {vocabulary}")


class _Uneven(Cache):
    """Rows of a cache, to each of which a token is put in a column of its own; the first ``end`` columns are seen."""

    def __init__(self, rows: Cache, rows_B: Tensor | None, columns_B: Tensor, end: int) -> None:
        self.keys, self.values, self.capacity, self.length = rows.keys, rows.values, rows.capacity, end - 1
        self.rows_B, self.columns_B = rows_B, columns_B  # rows_B None: all of them

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        rows_B = self.rows_B if self.rows_B is not None else torch.arange(len(keys), device=keys.device)
        keys[rows_B, :, self.columns_B] = k_BGTK[:, :, 0]
        values[rows_B, :, self.columns_B] = v_BGTK[:, :, 0]
        end = self.length + 1
        if self.rows_B is None:
            return keys[:, :, :end], values[:, :, :end]
        return keys[rows_B, :, :end], values[rows_B, :, :end]


def _decode_uneven(model: OpenELM, tokens_B: Tensor, rows: _Uneven) -> Tensor:
    """States (B, D) of one token of each row."""
    seen_S = torch.arange(rows.length + 1, device=tokens_B.device)
    mask = (seen_S <= rows.columns_B[:, None])[:, None, None]
    return model.hidden(tokens_B[:, None], positions=rows.columns_B[:, None], mask=mask, cache=rows)[:, 0]


class _Step:
    """One token of every slot with shapes that never change: compiled where that is asked for, on CUDA a graph.

    Slots that do not take part compute too; what they write stands behind their text, where the next token goes.
    """

    def __init__(self, model: OpenELM, rows: Cache, compile: bool) -> None:
        count, device = len(rows.keys[0]), rows.keys[0].device
        self._tokens_B = torch.zeros(count, dtype=torch.int64, device=device)
        self._columns_B = torch.zeros(count, dtype=torch.int64, device=device)
        self._columns = [0] * count  # what stands there
        uneven = _Uneven(rows, None, self._columns_B, rows.capacity)

        def step() -> Tensor:
            return _decode_uneven(model, self._tokens_B, uneven)

        self._run: Callable[[], Tensor] = torch.compile(step, fullgraph=True, dynamic=False) if compile else step
        self._recorded = device.type != "cuda"

    def __call__(self, slots: Sequence[int], tokens_B: Tensor, lengths: list[int]) -> Tensor:
        if lengths != self._columns:
            self._columns_B.copy_(torch.tensor(lengths))
        everyone = list(slots) == list(range(len(lengths)))
        which_B = slice(None) if everyone else torch.tensor(slots, device=self._tokens_B.device)
        self._tokens_B[which_B] = tokens_B
        if not self._recorded:
            self._record()
        hidden_BD = self._run()[which_B]
        self._columns_B.add_(1)  # so that nothing waits for the host where all go on together
        self._columns = [length + 1 for length in lengths]
        return hidden_BD

    def _record(self) -> None:
        """Replace the step by its recording; what the runs before it write is written again."""
        side, run = torch.cuda.Stream(), self._run
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARMUP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_BD = run()

        def replay() -> Tensor:
            graph.replay()
            return hidden_BD

        self._run, self._recorded = replay, True


@cache
def has_compiler() -> bool:
    """Whether torch.compile can work here; where it cannot, that is said, once."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        found, wanted = has_triton(), "Triton"
    else:
        found, wanted = any(map(shutil.which, ("c++", "g++", "clang++"))), "a C++ compiler"
    if not found:
        print(f"torch.compile needs {wanted}, which is not here: decoding goes on without", file=sys.stderr)
    return found
