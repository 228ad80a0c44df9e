"""Some text of a source, from as many of its documents as there are: what a model is calibrated or compared on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from hashlib import blake2b

from openelm.data.filters import utf8_bytes
from openelm.data.pieces import Tokenizer
from openelm.data.sources import Source
from openelm.data.stream import is_held_out
from openelm.data.walk import documents_once

CHARACTERS = 4096  # of an excerpt, at most


@dataclass(frozen=True)
class Excerpts:
    """Parts of documents, each as ids that begin with BOS."""

    documents: list[list[int]]
    tokens: int  # BOS left out
    num_bytes: int
    digests: frozenset[bytes]  # of the whole documents that they are from

    def rows(self, length: int) -> list[list[int]]:
        """All ids joined and cut into rows of ``length``; what is left over is dropped."""
        ids = [id for document in self.documents for id in document]
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def excerpts(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    tokens: int,
    *,
    but: Set[bytes] = frozenset(),
    held_out: float = 1.0,
) -> Excerpts:
    """About ``tokens`` tokens of the documents at ``paths`` (files, folders, …, "python"), fewer where there are fewer.

    One excerpt of each document, its beginning, in an order that is always the same; where those are too few, two of
    each, four, and so on. Of ``held_out``, the fraction that a run with this fraction holds out; of ``but``, none.
    """
    found, most = _read(paths, tokenizer, tokens, 1, but, held_out), 1
    while found.tokens < tokens:
        most, before = 2 * most, found.tokens
        found = _read(paths, tokenizer, tokens, most, but, held_out)
        if found.tokens == before:  # there is no more
            break
    return found


def _read(
    paths: Sequence[str], tokenizer: Tokenizer, tokens: int, most: int, but: Set[bytes], held_out: float
) -> Excerpts:
    """At most ``most`` excerpts of a document, one behind the other."""
    ids, count, size, digests = [], 0, 0, set()
    for digest, part in _parts(paths, most, but, held_out):
        if not (encoded := tokenizer.encode(part)):
            continue
        ids.append([tokenizer.bos_id, *encoded])
        count, size = count + len(encoded), size + utf8_bytes(part)
        digests.add(digest)
        if count >= tokens:
            break
    return Excerpts(ids, count, size, frozenset(digests))


def _parts(paths: Sequence[str], most: int, but: Set[bytes], held_out: float) -> Iterator[tuple[bytes, str]]:
    """Digest of a document, and its first parts."""
    for text in _in_turn(paths):
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in but or not is_held_out(text, held_out):
            continue
        for start in range(0, min(len(text), most * CHARACTERS), CHARACTERS):
            yield digest, text[start : start + CHARACTERS]


def _in_turn(paths: Sequence[str]) -> Iterator[str]:
    """A document of each path, the next of each, and so on to the end of the last."""
    walks = [documents_once(Source(path, path), key=("excerpts", number)) for number, path in enumerate(paths)]
    while walks:
        for walk in list(walks):
            if (text := next(walk, None)) is None:
                walks.remove(walk)
            else:
                yield text
