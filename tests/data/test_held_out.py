"""Held-out text: a matter of content alone, scored once, and the two yardsticks by hand."""

import json
import lzma
import math
from itertools import pairwise
from pathlib import Path

import pytest

from openelm.data.held_out import held_out_documents, held_out_set, order_0_bits_per_byte, xz_bits_per_byte
from openelm.data.packing import IGNORE
from openelm.data.pieces import Preparation
from openelm.data.sources import Source
from openelm.data.stream import is_held_out

EVERYTHING = Preparation(min_characters=0, min_tokens=3, split_words=10**9, repair_text=False)
TEXTS = [" ".join(str(1000 * i + j) for j in range(1 + i % 13)) for i in range(1, 1500)]


class Numbers:
    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """The same documents as one file, as two, and as many."""
    root = tmp_path_factory.mktemp("layouts")
    for name in ("one", "two", "many"):
        (root / name).mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (root / "one" / "a.jsonl").write_text("".join(lines))
    (root / "two" / "a.jsonl").write_text("".join(reversed(lines[:400])))
    (root / "two" / "b.jsonl").write_text("".join(lines[400:]))
    for i, text in enumerate(TEXTS):
        (root / "many" / f"{i}.txt").write_text(text)
    return [Source(name, str(root / name)) for name in ("one", "two", "many")]


def test_the_same_documents_are_held_out_whatever_the_files(layouts: list[Source]) -> None:
    found = [list(held_out_documents(source, 0.1, key=(seed,))) for seed, source in enumerate(layouts)]
    assert found[0] != found[1]  # the order is the seed's
    assert sorted(found[0]) == sorted(found[1]) == sorted(found[2])
    assert sorted(found[0]) == sorted(text for text in TEXTS if is_held_out(text, 0.1))


def test_the_fraction_is_about_right_and_a_larger_one_holds_the_smaller() -> None:
    texts = [f"text number {i}" for i in range(20_000)]
    chosen = {fraction: {t for t in texts if is_held_out(t, fraction)} for fraction in (0.0, 0.01, 0.2, 1.0)}
    assert (len(chosen[0.0]), len(chosen[1.0])) == (0, len(texts))
    for fraction in (0.01, 0.2):
        deviation = math.sqrt(len(texts) * fraction * (1 - fraction))
        assert abs(len(chosen[fraction]) - len(texts) * fraction) < 4 * deviation
    assert chosen[0.01] < chosen[0.2]


@pytest.mark.parametrize("row_length", [5, 64])
def test_every_held_out_id_but_bos_is_scored_once(layouts: list[Source], row_length: int) -> None:
    held = held_out_set(layouts[:1], Numbers(), EVERYTHING, row_length, fraction=0.2, max_tokens=10**6, seed=0)
    scored = []
    for batch in held.batches(7):
        flat = zip(batch.tokens.ravel().tolist(), batch.targets.ravel().tolist(), strict=True)
        scored += [(token, target) for token, target in flat if target != IGNORE]
    expected = []
    for text in held.texts:
        ids = [1, *map(int, text.split()), 2]
        expected += list(pairwise(ids))
    assert scored == expected
    assert sorted(held.texts) == sorted(text for text in TEXTS if is_held_out(text, 0.2))
    assert held.bytes == sum(map(len, held.texts))


def test_max_tokens_bounds_the_set_and_is_shared_as_the_sources_are_mixed(layouts: list[Source]) -> None:
    sources = [Source("a", layouts[0].path, share=3.0), Source("b", layouts[2].path, share=1.0)]
    held = held_out_set(sources, Numbers(), EVERYTHING, 32, fraction=0.9, max_tokens=2000, seed=0)
    tokens = [len(text.split()) + 2 for text in held.texts]
    assert 2000 <= sum(tokens) < 2000 + 2 * 15
    first = next(i for i, _ in enumerate(tokens) if sum(tokens[: i + 1]) >= 1500) + 1
    assert set(held.texts[:first]) <= set(held_out_documents(sources[0], 0.9, key=(0, 0)))
    assert held.texts[first:] == list(held_out_documents(sources[1], 0.9, key=(0, 1)))[: len(tokens) - first]


def test_one_huge_document_does_not_burst_max_tokens(tmp_path: Path) -> None:
    (tmp_path / "huge.txt").write_text(" ".join(str(i) for i in range(10, 100_010)))
    preparation = Preparation(min_characters=0, min_tokens=3, split_words=100, repair_text=False)
    held = held_out_set([Source("a", str(tmp_path))], Numbers(), preparation, 32, fraction=1.0, max_tokens=1000, seed=0)
    assert len(held.texts) == 10


def test_nothing_held_out_gives_no_rows(layouts: list[Source]) -> None:
    held = held_out_set(layouts, Numbers(), EVERYTHING, 32, fraction=0.0, max_tokens=1000, seed=0)
    assert (held.texts, held.rows, list(held.batches(4))) == ([], [], [])


def test_order_0_is_the_entropy_of_the_bytes() -> None:
    assert order_0_bits_per_byte(["ab", "ab"]) == 1.0
    assert order_0_bits_per_byte(["aabc"]) == 1.5
    assert order_0_bits_per_byte(["é"]) == 1.0  # two different bytes
    assert order_0_bits_per_byte([bytes(range(128)).decode()]) == 7.0


def test_xz_is_that_of_the_texts_in_one_file() -> None:
    texts = ["the same sentence again and again. " * 20, "naïve " * 50]
    data = "".join(texts).encode()
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert xz_bits_per_byte(texts) < 2
