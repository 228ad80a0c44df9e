"""Examples that fit in memory as steps of batches: row k is a function of (examples, seed, k), whoever asks for it.

An epoch takes every example once, in an order of its own. Its rows are single examples (``pad``), or several that fill
a row together (``pack``), told apart by ``Batch.segments``. Pairs are rows by themselves.

Shapes: B rows, P pairs, T positions.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openelm.data.loader import Step
from openelm.data.packing import IGNORE, Batch
from openelm.data.pairs import Example, Pair
from openelm.data.stream_state import Snapshot
from openelm.data.walk import shuffled

WIDTH_MULTIPLE = 64  # rows are padded to one of these, so that there are few shapes
OPEN_ROWS = 64  # into which the next example may still go

Rows = list[list[int]]  # of each row the examples in it, by index


@dataclass(frozen=True, kw_only=True)
class ExampleBatch(Batch):
    """(B, T) rows of examples, padded with BOS; padding is a segment of its own.

    ``examples`` are the indices of those in it, row by row; ``seed``, for dropout, depends on the run's seed and on the
    numbers of the rows; ``read`` tokens are no padding.
    """

    examples: NDArray[np.int64]
    seed: int
    read: int

    def size(self) -> int:
        """Tokens that were read, padding left out."""
        return self.read

    def counted(self) -> int:
        """The targets that count."""
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True, kw_only=True)
class PairBatch(ExampleBatch):
    """(2P, T): the chosen answers of P pairs, then the rejected ones in the same order; ``examples`` are the pairs'."""

    fixed: bool = False

    def weight(self) -> int:
        """What the loss, summed over the batch, is divided by: the pairs."""
        return len(self.examples)

    def answers(self) -> tuple[Batch, Batch]:
        """(P, T) each: the chosen and the rejected, as wide as their own longest row, unless the width is ``fixed``."""
        P, T = len(self.examples), self.tokens.shape[1]
        halves = []
        for rows in (slice(None, P), slice(P, None)):
            counts_T = (self.targets[rows] != IGNORE).any(axis=0)  # the last of an answer does, and it ends its row
            width = T if self.fixed else min(T, _rounded(T - int(counts_T[::-1].argmax())))
            halves.append(Batch(self.tokens[rows, :width], self.targets[rows, :width]))
        return halves[0], halves[1]


class ExampleSteps:
    """Steps of ``global_batch`` rows over all ``ranks`` from row ``position`` on; this rank's in batches of ``rows``.

    Row k goes to rank k mod ``ranks``. Of a rank's rows of a step those of about the same length share a batch, the
    longest first, so that little of it is padding. A batch is as wide as its longest row, in steps of 64 positions, or,
    if ``fixed``, as ``row_length``. It never ends: epoch follows epoch. Use it with ``with``, as the loader.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[Pair],
        *,
        seed: int,
        packing: Literal["pad", "pack"] = "pad",
        row_length: int,
        bos_id: int,
        global_batch: int,
        rows: int,
        rank: int = 0,
        ranks: int = 1,
        position: int = 0,
        fixed: bool = False,
    ) -> None:
        assert global_batch % (ranks * rows) == 0, f"{global_batch} rows are not whole batches of {rows} on {ranks}"
        assert 0 <= rank < ranks and position >= 0
        assert examples, "there is nothing to train on"
        self._examples: list[Example | Pair] = [*examples]
        self._is_pairs = isinstance(self._examples[0], Pair)
        assert not (self._is_pairs and packing == "pack"), "pairs are not packed"
        self._lengths = [_positions(example) for example in self._examples]
        assert max(self._lengths) <= row_length, "an example has at most row_length + 1 ids"
        self._seed, self._packs = seed, packing == "pack"
        self._row_length, self._bos_id, self._fixed = row_length, bos_id, fixed
        self._global_batch, self._rows, self._rank, self._ranks = global_batch, rows, rank, ranks
        self._ends: list[int] = []  # rows of the epochs up to each, as far as they are known
        self._kept: dict[int, Rows] = {}  # the rows of the latest epochs
        self.position = position

    def __enter__(self) -> ExampleSteps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Step]:
        while True:
            start_s = time.perf_counter()
            first, last = self.position, self.position + self._global_batch
            own = [k for k in range(first, last) if k % self._ranks == self._rank]
            own.sort(key=lambda k: (-self._longest(self.row(k)), k))
            parts = [own[i : i + self._rows] for i in range(0, len(own), self._rows)]
            batches: list[Batch] = [self.batch([*map(self.row, part)], _seed(self._seed, part)) for part in parts]
            self.position = last
            yield Step(batches, first, time.perf_counter() - start_s, partial(Snapshot, last, 0, ()))

    def row(self, number: int) -> list[int]:
        """The examples of a row, by their indices."""
        epoch, place = self._place(number)
        return self._epoch(epoch)[place]

    def _longest(self, row: list[int]) -> int:
        """Positions of a row; of a pair, of its longer answer."""
        return sum(self._lengths[index] for index in row)

    def rows_in(self, epochs: float) -> int:
        """How many rows so many epochs have, a begun one included."""
        whole = math.floor(epochs)
        rest = epochs - whole
        before = self._end(whole - 1)
        if not rest:
            return before
        # 1.02 epochs of 50 rows are 51, and in floating point a little more.
        return before + math.ceil(round(rest * (self._end(whole) - before), 6))

    def filling(self) -> float:
        """Share of the positions of the first epoch, in rows of ``row_length``, that hold an example."""
        sequences = 2 if self._is_pairs else 1
        used = sum(len(example.ids) - 1 for item in self._examples for example in _sequences(item))
        return used / (sequences * self._row_length * self.rows_in(1))

    def counts(self) -> dict[str, Any]:
        """How many epochs the rows up to ``position`` are (2.5: half of the third), and the examples of each."""
        epoch, place = self._place(self.position)
        return {"epoch": epoch + place / (self._end(epoch) - self._end(epoch - 1)), "examples": len(self._examples)}

    # Which row is where

    def _place(self, number: int) -> tuple[int, int]:
        """The epoch of a row, and its number there."""
        while not self._ends or self._ends[-1] <= number:
            self._end(len(self._ends))
        epoch = bisect_right(self._ends, number)
        return epoch, number - self._end(epoch - 1)

    def _end(self, epoch: int) -> int:
        """The number of rows up to the end of an epoch."""
        for unknown in range(len(self._ends), epoch + 1):
            rows = len(self._epoch(unknown)) if self._packs else len(self._examples)
            self._ends.append(self._end(unknown - 1) + rows)
        return self._ends[epoch] if epoch >= 0 else 0

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._kept:
            order = shuffled(len(self._examples), self._seed, epoch)
            made = packed(order, self._lengths, self._row_length) if self._packs else [[index] for index in order]
            self._kept = {**{other: rows for other, rows in self._kept.items() if other == epoch - 1}, epoch: made}
        return self._kept[epoch]

    # Arrays

    def batch(self, rows: Rows, seed: int = 0) -> ExampleBatch:
        """Rows of examples, which are given by their indices, as arrays."""
        examples = np.array([index for row in rows for index in row], dtype=np.int64)
        found = [[self._examples[index] for index in row] for row in rows]
        parts: list[list[Example]]
        if self._is_pairs:
            pairs = [item for row in found for item in row if isinstance(item, Pair)]
            parts = [[pair.chosen] for pair in pairs] + [[pair.rejected] for pair in pairs]
        else:
            parts = [[item for item in row if isinstance(item, Example)] for row in found]
        lengths = [sum(len(example.ids) - 1 for example in row) for row in parts]
        tokens, targets, segments = arrays(parts, self._width(max(lengths)), self._bos_id)
        given: dict[str, Any] = dict(examples=examples, seed=seed, read=sum(lengths))
        if self._is_pairs:
            return PairBatch(tokens, targets, **given, fixed=self._fixed)
        return ExampleBatch(tokens, targets, segments if self._packs else None, **given)

    def _width(self, longest: int) -> int:
        if self._fixed:
            return self._row_length
        return min(self._row_length, _rounded(longest))


def arrays(parts: Sequence[Sequence[Example]], width: int, bos_id: int) -> tuple[NDArray[np.int64], ...]:
    """Tokens, targets and segments, numbered from 0 in each row, of rows of examples."""
    shape = len(parts), width
    tokens = np.full(shape, bos_id, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    segments = np.empty(shape, dtype=np.int64)
    for row, examples in enumerate(parts):
        start = 0
        for number, example in enumerate(examples):
            end = start + len(example.ids) - 1
            tokens[row, start:end] = example.ids[:-1]
            targets[row, start:end] = np.where(example.counts[1:], example.ids[1:], IGNORE)
            segments[row, start:end] = number
            start = end
        segments[row, start:] = len(examples)
    return tokens, targets, segments


def once(
    examples: Sequence[Example] | Sequence[Pair], *, rows: int, row_length: int, bos_id: int, fixed: bool = False
) -> list[ExampleBatch]:
    """Every example once, in batches of ``rows`` (the last may be smaller), the longest first; for measuring."""
    if not examples:
        return []
    steps = ExampleSteps(
        examples, seed=0, row_length=row_length, bos_id=bos_id, global_batch=rows, rows=rows, fixed=fixed
    )
    order = sorted(range(len(examples)), key=lambda index: (-_positions(examples[index]), index))
    return [steps.batch([[index] for index in order[i : i + rows]]) for i in range(0, len(order), rows)]


def packed(order: Sequence[int], lengths: Sequence[int], row_length: int) -> Rows:
    """Rows that hold each example of ``order`` once and at most ``row_length`` positions, by their first examples.

    Each goes where it leaves the least room, among a bounded number of rows: time grows with the examples alone.
    """
    rows: Rows = []
    open_rows: list[tuple[int, int]] = []  # room and number, sorted
    for index in order:
        place = bisect_left(open_rows, (lengths[index], 0))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            room, row = row_length, len(rows)
            rows.append([index])
            if len(open_rows) == OPEN_ROWS:
                del open_rows[0]
        insort(open_rows, (room - lengths[index], row))
    return rows


def _rounded(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _sequences(item: Example | Pair) -> tuple[Example, ...]:
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


def _positions(item: Example | Pair) -> int:
    """Inputs of an example, or of the longer answer of a pair."""
    return max(len(example.ids) - 1 for example in _sequences(item))


def _seed(seed: int, numbers: Sequence[int]) -> int:
    """Below 2**63, another for every other rows."""
    digest = blake2b(repr((seed, list(numbers))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
