"""Which test examples stand in the training text: n words in a row that both have, wherever they are.

The n-grams of the test sets are kept as 64-bit hashes, and the training text goes by them once. A hash only points to
where to look: what counts is that the words are the same. Memory is that of the test sets, about 100 bytes a word and
100 a distinct word, whatever the amount of training text.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, groupby, repeat
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openelm.data.filters import utf8_bytes
from openelm.data.sources import CorruptFile, Source, decode_record, find_units, read_records
from openelm.data.stream import is_held_out
from openelm.data.test_sets import TestExample
from openelm.data.walk import shuffled
from openelm.errors import UserError

# The most that GPT-3's authors compared (arXiv:2005.14165, appendix C); for test sets of short texts down to 8.
NGRAM_WORDS = 13
PROMPT_EXAMPLES = 10  # what more examples of a set have, and more than half of them, is the prompt around them
PART_CHARACTERS = 1 << 20  # a longer document is looked at in parts
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of an earlier word is lost
_FILTER_PER_NGRAM = 16  # entries of the table that most n-grams of a training text do not get past
BATCH_WORDS = 1 << 16  # compared at a time, of as many documents as that takes
_SPACE = re.compile(r"\s")
_ASCII = bytes(range(128))
_PUNCTUATION = string.punctuation.encode()

Ids = NDArray[np.int32]
Hashes = NDArray[np.uint64]


class Location(NamedTuple):
    """A document of the training text: its number within the file, from 0."""

    source: str
    file: str
    document: int


class Match(NamedTuple):
    """Words that an example and a document both have in a row, as they are compared.

    Of each n-gram only the first place is known, so a document read later may have a longer passage.
    """

    words: int
    text: str
    location: Location


@dataclass(frozen=True)
class SharedExample:
    """An example of which the training text has at least n words in a row."""

    id: str
    words: int  # of its own, the prompt around it left out
    covered: float  # share of them that lie in a shared n-gram
    longest: Match


@dataclass(frozen=True)
class SetOverlap:
    """What the training text has of one test set."""

    set: str
    examples: int
    short: int  # of fewer than n words in a row of their own, which are not compared
    shared: tuple[SharedExample, ...]  # those most covered first

    @property
    def share(self) -> float | None:
        """Of the examples that were compared; None where there are none."""
        compared = self.examples - self.short
        return len(self.shared) / compared if compared else None


@dataclass
class Read:
    """What was read of a source."""

    documents: int = 0
    held_out: int = 0  # not looked at: training does not see them
    undecodable: int = 0
    bytes: int = 0
    complete: bool = False  # not so where it is a sample, was interrupted, or a damaged file was skipped


@cache
def _foreign_punctuation() -> frozenset[str]:
    """What Unicode calls punctuation, beyond ASCII."""
    beyond = map(chr, range(128, sys.maxunicode + 1))
    return frozenset(c for c in beyond if unicodedata.category(c).startswith("P"))


def normalized_words(text: str) -> list[str]:
    """Words in lower case without punctuation, whatever white space parts them.

    As the paper's filter does it, and beyond ASCII too: a test set has straight quotes where a web page has curly ones.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)  # as training repairs it
        others = text.encode("utf-8", "surrogatepass").translate(None, _ASCII).decode("utf-8", "surrogatepass")
        for mark in _foreign_punctuation().intersection(others):
            text = text.replace(mark, "")
    # Bytes, because str.translate is ten times slower where a single character is not ASCII.
    raw = text.lower().encode("utf-8", "surrogatepass").translate(None, _PUNCTUATION)
    return raw.decode("utf-8", "surrogatepass").split()


class Overlap:
    """Test sets as n-grams, and which of them were seen so far. UserError: no example has n words."""

    # W words of all examples one after another, G distinct n-grams

    def __init__(self, examples: Iterable[TestExample], n: int = NGRAM_WORDS) -> None:
        if n < 1:
            raise UserError(f"n-grams of {n} words: there must be at least 1, and {NGRAM_WORDS} are usual")
        self.n = n
        self._vocabulary: dict[str, int] = {}  # ids from 1; 0 is a word that no example has
        self._examples: list[tuple[str, str, int, int]] = []  # set, id, first word, behind the last one
        parts: list[Ids] = []
        end = 0
        for example in examples:
            words = normalized_words(example.text)
            parts.append(np.array([self._vocabulary.setdefault(w, len(self._vocabulary) + 1) for w in words], np.int32))
            self._examples.append((example.set, example.id, end, end + len(words)))
            end += len(words)
        self._ids_W = np.concatenate([*parts, np.empty(0, np.int32)])
        starts = [np.arange(first, last - n + 1) for _, _, first, last in self._examples if last - first >= n]
        if not starts:
            longest = max((last - first for _, _, first, last in self._examples), default=0)
            raise UserError(
                f"none of {len(self._examples):,} test examples has {n} words, so nothing can be compared: "
                + (f"the longest has {longest}, ask for n-grams of at most that" if longest else "give texts")
            )
        self._index(np.concatenate(starts))
        self._leave_out_prompts()

    def _index(self, starts: NDArray[np.int64]) -> None:
        """Number the n-grams that begin at ``starts``, equal ones alike, and sort them by hash."""
        for seed in count():
            random = np.random.default_rng(seed)
            self._values = random.integers(2**64, size=len(self._vocabulary) + 1, dtype=np.uint64)
            hashes = self._hashes_of(self._ids_W)[starts]
            self._hashes_G, first, ngram = np.unique(hashes, return_index=True, return_inverse=True)
            self._start_G = starts[first]  # where its words stand
            if all((self._ids_W[starts + j] == self._ids_W[self._start_G[ngram] + j]).all() for j in range(self.n)):
                break  # no two different n-grams of the test sets have one hash
        self._ngram_W = np.full(len(self._ids_W), -1, np.int32)  # of the one that begins with a word
        self._ngram_W[starts] = ngram
        # Where it was seen first, as the number of a word of the training text; a word more between two documents.
        self._seen_G = np.full(len(first), -1, np.int64)
        self._locations: list[tuple[int, Location]] = []  # from which word on, of each part in which something was seen
        self._waiting: list[tuple[Ids, Location]] = []
        self._waiting_words, self._read_words = 0, 0  # before those that wait
        bits = (_FILTER_PER_NGRAM * len(first)).bit_length()
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, np.bool_)
        self._filter[self._hashes_G >> self._shift] = True

    def _leave_out_prompts(self) -> None:
        """Leave out the words that most examples of a set have: a training text with that prompt has none of them."""
        self._own_W = np.ones(len(self._ids_W), np.bool_)
        for examples in self._by_set().values():
            times_G = np.zeros(len(self._hashes_G), np.int32)
            for _, first, last in examples:
                times_G[np.unique(self._ngrams(first, last))] += 1
            often_G = times_G > max(PROMPT_EXAMPLES, len(examples) / 2)
            for _, first, last in examples if often_G.any() else ():
                for start in first + np.flatnonzero(often_G[self._ngrams(first, last)]):
                    self._own_W[start : start + self.n] = False
        left_out = np.concatenate([[0], np.cumsum(~self._own_W)])
        touched = left_out[self.n :] > left_out[: -self.n]
        self._ngram_W[: len(touched)][touched] = -1

    def _by_set(self) -> dict[str, list[tuple[str, int, int]]]:
        """Id, first word and end of the examples of each set."""
        by_set: dict[str, list[tuple[str, int, int]]] = {}
        for name, id, first, last in self._examples:
            by_set.setdefault(name, []).append((id, first, last))
        return by_set

    def _ngrams(self, first: int, last: int) -> Ids:
        """Numbers of the n-grams of an example's words, -1 for those that are left out."""
        return self._ngram_W[first : max(first, last - self.n + 1)]

    def _hashes_of(self, ids: Ids) -> Hashes:
        """A hash of each n words in a row."""
        values = self._values[ids]
        windows = max(0, len(ids) - self.n + 1)
        hashes = values[:windows].copy()
        for j in range(1, self.n):
            hashes *= _MULTIPLIER
            hashes += values[j : j + windows]
        return hashes

    def look(self, text: str, location: Location) -> None:
        """Note which n-grams of the test sets a document has."""
        for part in _parts(text):
            words = normalized_words(part)
            self._wait(np.fromiter(map(self._vocabulary.get, words, repeat(0)), np.int32, len(words)), location)
        self._wait(np.zeros(1, np.int32), location)  # no n-gram goes on into the next document

    def _wait(self, ids: Ids, location: Location) -> None:
        """Put words of a document behind those that wait, and compare them when they are many."""
        self._waiting.append((ids, location))
        self._waiting_words += len(ids)
        if self._waiting_words >= BATCH_WORDS:
            ids = self._compare()
            end = ids[max(0, len(ids) - self.n + 1) :]  # an n-gram may begin here
            self._read_words += len(ids) - len(end)
            self._waiting, self._waiting_words = [(end, location)], len(end)

    def _compare(self) -> Ids:
        """Look up all n-grams of the words that wait."""
        ids = np.concatenate([part for part, _ in self._waiting])
        hashes = self._hashes_of(ids)
        at = np.flatnonzero(self._filter[hashes >> self._shift])
        ngram = np.minimum(np.searchsorted(self._hashes_G, hashes[at]), len(self._hashes_G) - 1)
        new = (self._hashes_G[ngram] == hashes[at]) & (self._seen_G[ngram] < 0)
        at, ngram = at[new], ngram[new]
        same = np.ones(len(at), np.bool_)
        for j in range(self.n):
            same &= ids[at + j] == self._ids_W[self._start_G[ngram] + j]
        ngram, first = np.unique(ngram[same], return_index=True)
        at = at[same][first]
        self._seen_G[ngram] = self._read_words + at
        begins = np.cumsum([0, *(len(part) for part, _ in self._waiting[:-1])])
        for part in np.unique(np.searchsorted(begins, at, side="right") - 1):
            self._locations.append((self._read_words + int(begins[part]), self._waiting[part][1]))
        return ids

    def found(self) -> list[SetOverlap]:
        """What was seen of each test set up to now."""
        if self._waiting:
            self._compare()
        words = ["", *self._vocabulary]
        sets = []
        for name, examples in self._by_set().items():
            short = sum(not (self._ngrams(first, last) >= 0).any() for _, first, last in examples)
            shared = filter(None, (self._shared(id, first, last, words) for id, first, last in examples))
            ranked = sorted(shared, key=lambda example: (-example.covered, -example.longest.words))
            sets.append(SetOverlap(name, len(examples), short, tuple(ranked)))
        return sets

    def _shared(self, id: str, first: int, last: int, words: list[str]) -> SharedExample | None:
        """What was seen of one example; None where nothing was."""
        ngrams = self._ngrams(first, last)
        seen = np.where(ngrams >= 0, self._seen_G[ngrams], -1)
        at = np.flatnonzero(seen >= 0)
        if not at.size:
            return None
        covered = np.zeros(last - first, np.bool_)
        for start in at:
            covered[start : start + self.n] = True
        # A run goes on as long as the next n-gram is the next one in the document too.
        runs = np.split(at, np.flatnonzero((np.diff(at) > 1) | (np.diff(seen[at]) != 1)) + 1)
        longest = max(runs, key=len)
        length = len(longest) + self.n - 1
        begin = first + int(longest[0])
        text = " ".join(words[word] for word in self._ids_W[begin : begin + length])
        part = bisect_right(self._locations, int(seen[longest[0]]), key=itemgetter(0)) - 1
        match = Match(length, text, self._locations[part][1])
        own = int(self._own_W[first:last].sum())
        return SharedExample(id, own, int(covered.sum()) / own, match)


def _parts(text: str) -> Iterator[str]:
    """The text in parts that end before white space."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        space = _SPACE.search(text, start + PART_CHARACTERS)
        if space is None:
            break
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]


# Training text


def read_source(
    source: Source,
    overlap: Overlap,
    read: Read,
    *,
    held_out: float = 0.0,
    limit: int | None = None,
    seed: tuple[int, int] = (0, 0),
) -> Iterator[None]:
    """Look at each training document of a source, or at the first ``limit``, its files being in shuffled order.

    A document is looked at whole: text that the filters would drop, or that a padded row has no room for, counts too.
    ``read`` is brought up to date, and whoever asks is given a turn, behind each document.
    """
    damaged: list[str] = []
    for text, location in documents(source, seed, damaged.append):
        if limit is not None and read.documents >= limit:
            return
        if text is None:
            read.undecodable += 1
        else:
            read.bytes += utf8_bytes(text)
            if is_held_out(text, held_out):
                read.held_out += 1
            else:
                overlap.look(text, location)
        read.documents += 1
        yield
    read.complete = not damaged


def documents(
    source: Source, seed: tuple[int, int], on_corrupt: Callable[[str], None]
) -> Iterator[tuple[str | None, Location]]:
    """Text (None: undecodable) and place of every document, once; files shuffled, each read from its beginning.

    A damaged file raises CorruptFile, or is named to ``on_corrupt`` and its rest skipped, as the source says; numbers
    behind the damage count what could be read.
    """
    files = [list(units) for _, units in groupby(find_units(source), lambda unit: unit.path)]
    for file in (files[i] for i in shuffled(len(files), *seed, "files")):
        numbers = count()
        for unit in file:
            try:
                for record, number in zip(read_records(unit, source), numbers, strict=False):
                    text = decode_record(record, unit, source).text
                    yield text, Location(source.name, unit.path, number)
            except CorruptFile:
                if source.on_corrupt == "stop":
                    raise
                on_corrupt(unit.path)
