"""Rows: every id is a target exactly once, no BOS is, and padding counts nothing."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest

from openelm.data.packing import IGNORE, Batch, Ids, Packing

BOS, EOS = 1, 2
EMPTY: Ids = np.empty(0, dtype=np.int32)


def pieces_of(draw: random.Random, count: int, longest: int) -> list[list[int]]:
    """Pieces whose inner ids are all different, so that a lost, doubled or moved one shows."""
    ids = iter(range(3, 10**6))
    return [[BOS, *(next(ids) for _ in range(draw.randint(0, longest))), EOS] for _ in range(count)]


def pack(packing: Packing, pieces: list[list[int]]) -> tuple[list[Ids], Ids]:
    rows, remainder = [], EMPTY
    for piece in pieces:
        more, remainder = packing.take_rows(remainder, piece)
        rows += more
    return rows, remainder


def test_pad_row_is_the_first_ids_of_a_piece_and_nothing_is_carried_over() -> None:
    packing = Packing(4, mode="pad")
    rows, remainder = packing.take_rows(EMPTY, [BOS, 3, 4, 5, 6, 7, EOS])
    assert [row.tolist() for row in rows] == [[BOS, 3, 4, 5, 6]] and len(remainder) == 0
    rows, _ = packing.take_rows(remainder, [BOS, 3, EOS])
    assert [row.tolist() for row in rows] == [[BOS, 3, EOS]]
    batch = packing.batch(rows, BOS)
    assert batch.tokens.tolist() == [[BOS, 3, EOS, BOS]]
    assert batch.targets.tolist() == [[3, EOS, IGNORE, IGNORE]]
    assert batch.weight() == 2


@pytest.mark.parametrize("row_length", [1, 2, 7, 64])
@pytest.mark.parametrize("longest", [3, 200])
def test_each_id_but_bos_is_a_target_exactly_once_after_the_id_before_it(row_length: int, longest: int) -> None:
    packing = Packing(row_length)
    pieces = pieces_of(random.Random(row_length), 60, longest)
    rows, remainder = pack(packing, pieces)
    assert all(len(row) == row_length + 1 for row in rows)
    joined = [id for piece in pieces for id in piece]
    pairs = [(before, id) for before, id in pairwise(joined) if id != BOS]
    batch = packing.batch(rows, BOS)
    flat = zip(batch.tokens.ravel().tolist(), batch.targets.ravel().tolist(), strict=True)
    served = [(token, target) for token, target in flat if target != IGNORE]
    served += [(b, t) for b, t in pairwise(remainder.tolist()) if t != BOS]
    assert served == pairs


def test_the_count_of_targets_is_what_the_rows_then_serve() -> None:
    for mode in ("pack", "pad"):
        packing = Packing(16, mode=mode)
        pieces = pieces_of(random.Random(5), 80, 40)
        rows, remainder = pack(packing, pieces)
        left = [id for id in remainder.tolist()[1:] if id != BOS]
        valid = packing.batch(rows, BOS).weight()
        assert sum(map(packing.targets, pieces)) == valid + len(left)


def test_bos_is_a_target_only_where_pieces_may_be_crossed() -> None:
    pieces = [[BOS, 3, EOS], [BOS, 4, EOS], [BOS, 5, EOS]]
    for cross_pieces, expected in ((False, IGNORE), (True, BOS)):
        packing = Packing(8, cross_pieces=cross_pieces)
        rows, _ = pack(packing, pieces)
        assert packing.batch(rows, BOS).targets.tolist() == [[3, EOS, expected, 4, EOS, expected, 5, EOS]]


def test_padding_is_ignored_even_where_pieces_may_be_crossed() -> None:
    packing = Packing(6, mode="pad", cross_pieces=True)
    batch = packing.batch([np.array([BOS, 3, EOS], dtype=np.int32)], BOS)
    assert batch.targets.tolist() == [[3, EOS] + [IGNORE] * 4]


def test_segments_number_the_pieces_of_each_row() -> None:
    packing = Packing(5, separate_pieces=True)
    rows, _ = pack(packing, [[BOS, 3, 4, EOS], [BOS, 5, 6, 7, 8, EOS], [BOS, EOS]])
    batch = packing.batch(rows, BOS)
    assert batch.tokens.tolist() == [[BOS, 3, 4, EOS, BOS], [5, 6, 7, 8, EOS]]
    assert batch.segments is not None and batch.segments.tolist() == [[1, 1, 1, 1, 2], [0, 0, 0, 0, 0]]
    assert Packing(5).batch(rows, BOS).segments is None


def test_a_batch_as_tensors_holds_the_same_numbers() -> None:
    packing = Packing(5, separate_pieces=True)
    rows, _ = pack(packing, [[BOS, 3, 4, EOS], [BOS, 5, 6, 7, 8, EOS]])
    batch = packing.batch(rows, BOS)
    tokens, targets, segments = batch.tensors("cpu")
    assert tokens.tolist() == batch.tokens.tolist() and targets.tolist() == batch.targets.tolist()
    assert segments is not None and batch.segments is not None and segments.tolist() == batch.segments.tolist()


@pytest.mark.parametrize("separate", [True, False])
def test_a_batch_comes_back_from_its_plain_form(separate: bool) -> None:
    packing = Packing(row_length=4, separate_pieces=separate)
    batch = packing.batch([np.array([1, 5, 6, 1, 7]), np.array([1, 8, 9])], bos_id=1)
    again = Batch.from_plain(json.loads(json.dumps(batch.as_plain())))
    for name in ("tokens", "targets", "segments"):
        one, other = getattr(batch, name), getattr(again, name)
        assert (one is None) == (other is None) == (name == "segments" and not separate)
        assert one is None or (one.dtype == other.dtype and np.array_equal(one, other))
