"""The text that training never sees: chosen by a hash of its content, the same in every run of the same data."""

from __future__ import annotations

import lzma
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from openelm.data.filters import utf8_bytes
from openelm.data.packing import Batch, Ids, Packing
from openelm.data.pieces import Preparation, Tokenizer
from openelm.data.sources import Source, Unit
from openelm.data.stream import is_held_out
from openelm.data.walk import documents_once


@dataclass(frozen=True)
class HeldOut:
    """Held-out pieces as text and as packed rows; every id but the BOS is a target exactly once."""

    texts: list[str]
    rows: list[Ids]
    bos_id: int
    packing: Packing

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the texts."""
        return sum(map(utf8_bytes, self.texts))

    def batches(self, rows: int) -> Iterator[Batch]:
        """The rows in batches of ``rows``; the last may be smaller."""
        for start in range(0, len(self.rows), rows):
            yield self.packing.batch(self.rows[start : start + rows], self.bos_id)


def held_out_set(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    preparation: Preparation,
    row_length: int,
    *,
    fraction: float,
    max_tokens: int,
    seed: int,
    units: Sequence[list[Unit]] | None = None,
) -> HeldOut:
    """About ``max_tokens`` of held-out text, shared among the sources as they are mixed; fewer where there is less.

    ``units`` are those of each source, where they have been found already.
    """
    packing = Packing(row_length)
    texts: list[str] = []
    ids: list[int] = []
    total_share = sum(source.share for source in sources)
    for index, source in enumerate(sources):
        budget = max_tokens * source.share / total_share
        found = units[index] if units else None
        for text in held_out_documents(source, fraction, key=(seed, index), units=found):
            if budget <= 0:
                break
            for piece in preparation.pieces(text, tokenizer):
                if budget <= 0:
                    break
                if piece.ids:
                    texts.append(piece.text)
                    ids += piece.ids
                    budget -= len(piece.ids)
    rows, rest = packing.take_rows(np.empty(0, dtype=np.int32), ids)
    if len(rest) > 1:
        rows.append(rest)
    return HeldOut(texts, rows, tokenizer.bos_id, packing)


def held_out_documents(
    source: Source, fraction: float, key: tuple[object, ...], units: list[Unit] | None = None
) -> Iterator[str]:
    """The held-out documents of one source, once each, in the order of the stream's first epoch."""
    return (text for text in documents_once(source, key, units) if is_held_out(text, fraction))


def order_0_bits_per_byte(texts: Sequence[str]) -> float:
    """Entropy of the texts' own byte frequencies: the best that a model without memory could do."""
    counts = Counter("".join(texts).encode("utf-8", "replace"))
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """What ``xz -9`` needs for the texts in one file."""
    data = "".join(texts).encode("utf-8", "replace")
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
