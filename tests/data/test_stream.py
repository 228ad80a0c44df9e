"""The token stream: rows are a function of the data and the seed, whatever is stopped, moved or mixed."""

import gzip
import json
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openelm.data import walk
from openelm.data.packing import Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import CorruptFile, Source
from openelm.data.stream import FATES, Place, TokenStream, is_held_out, owned_shards
from openelm.data.stream_state import merge_counts, merge_states
from openelm.errors import UserError

BOS, EOS = 1, 2


class Numbers:
    """A tokenizer for texts of numbers: each is its own id."""

    bos_id, eos_id = BOS, EOS

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


EVERYTHING = Preparation(min_characters=0, min_tokens=3, split_words=10**9, repair_text=False)


def documents(count: int, *, longest: int = 60, shortest: int = 1, first: int = 10, seed: int = 0) -> list[str]:
    """Documents that begin with a number of their own (first, first + 1, ...), then numbers from 100,000 on."""
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [
        " ".join([str(first + i), *(str(draw.randint(100_000, 200_000)) for _ in range(length - 1))])
        for i, length in enumerate(lengths)
    ]


def one_file(folder: Path, texts: list[str], name: str = "all.jsonl") -> Source:
    folder.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return Source("one", str(folder))


def many_files(folder: Path, texts: list[str]) -> Source:
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:05}.txt").write_text(text)
    return Source("many", str(folder))


LAYOUTS: dict[str, Callable[[Path, list[str]], Source]] = {
    "jsonl": one_file,
    "gz": lambda folder, texts: one_file(folder, texts, "all.jsonl.gz"),
    "txt": many_files,
}


def stream(*sources: Source, preparation: Preparation = EVERYTHING, **options: Any) -> TokenStream:
    packing = options.pop("packing", Packing(16))
    options = {"seed": 1, "shards": 4, **options}
    return TokenStream(sources, Numbers(), preparation, packing, **options)


def rows(stream: TokenStream, count: int) -> list[list[int]]:
    return [stream.next_row().tolist() for _ in range(count)]


def state(stream: TokenStream) -> str:
    """The state as a checkpoint holds it."""
    return json.dumps(stream.state())


def kept_first_ids(stream: TokenStream, epoch: int) -> Counter[int]:
    """How often each document is read while its shard is in ``epoch``, by its first id. Reads that epoch to its end."""
    seen: Counter[int] = Counter()
    for shard in range(stream.shards):
        while stream._states[shard].places[0].epoch <= epoch:
            before = stream._states[shard]
            stream._read_piece(shard)
            after = stream._states[shard]
            if after.opened[0] is not None and before.opened[0] is None and after.places[0].epoch == epoch:
                seen[int(stream._parts[shard][0][0].split(" ")[0] or -1)] += 1
    return seen


# Rows as a function of data and seed


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    source = one_file(tmp_path, documents(200))
    first = rows(stream(source), 300)
    assert rows(stream(source), 300) == first
    assert rows(stream(source, seed=2), 300) != first


def test_rows_do_not_depend_on_how_many_are_taken_at_once(tmp_path: Path) -> None:
    source = one_file(tmp_path, documents(100))
    by_one = rows(stream(source), 60)
    other = stream(source)
    taken = [row for size in (1, 7, 20, 2, 30) for row in other.next_batch(size).tokens.tolist()]
    assert taken == [row[:-1] for row in by_one]


def test_a_shard_gives_its_rows_whatever_the_other_shards_do(tmp_path: Path) -> None:
    """A worker that owns one shard gets what the whole process would have got."""
    for layout in LAYOUTS:
        source = LAYOUTS[layout](tmp_path / layout, documents(90))
        together = rows(stream(source), 400)
        for shard in range(4):
            alone = stream(source)
            for step in range(100):
                assert alone.next_of(shard).tolist() == together[step * 4 + shard]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_the_data_changes_nothing(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path / "here", documents(150))
    reference = stream(source, seed=3)
    expected = rows(reference, 100)
    saved = json.loads(state(reference))
    expected_later = rows(reference, 100)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = replace(source, path=str(tmp_path / "there"))
    assert rows(stream(moved, seed=3), 100) == expected
    resumed = stream(moved, seed=3)
    resumed.restore(saved)
    assert rows(resumed, 100) == expected_later


def test_without_kept_blocks_and_open_readers_the_rows_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept in memory or left open is a matter of speed alone."""
    texts = documents(400, longest=200)
    source = one_file(tmp_path, texts, "all.jsonl.gz")
    monkeypatch.setattr(walk, "BLOCK_RECORDS", 16)
    expected = rows(stream(source, shards=7), 1500)
    monkeypatch.setattr(walk, "KEPT_BYTES", 0)
    assert rows(stream(source, shards=7), 1500) == expected
    monkeypatch.setattr(walk, "READERS_KEPT", 1)
    assert rows(stream(source, shards=7), 1500) == expected


# Resuming


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_resume_anywhere_and_twice_gives_the_same_rows(
    tmp_path: Path, layout: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "BLOCK_RECORDS", 16)
    texts = documents(60, longest=250)
    sources = [
        LAYOUTS[layout](tmp_path / "a", texts),
        replace(one_file(tmp_path / "b", documents(9, first=1000, seed=1)), name="b", share=0.3),
    ]
    preparation = Preparation(min_characters=30, min_tokens=8, split_words=20, repair_text=False)
    options: dict[str, Any] = {"preparation": preparation, "packing": Packing(32, mode=mode), "held_out": 0.2}
    total = 260
    reference = stream(*sources, **options)
    expected, states = [], []
    for _ in range(total):
        states.append((state(reference), json.dumps(reference.counts())))
        expected += rows(reference, 1)
    middles = [json.loads(text)["states"] for text, _ in states]
    assert any(shard["opened"][0] and shard["opened"][0]["piece"] for all_ in middles for shard in all_)
    assert mode == "pad" or any(len(shard["remainder"]) > 1 for all_ in middles for shard in all_)
    for start in range(0, total - 40, 3):
        first = stream(*sources, **options)
        first.restore(json.loads(states[start][0]))
        assert json.dumps(first.counts()) == states[start][1]
        assert rows(first, 20) == expected[start : start + 20]
        second = stream(*sources, **options)
        second.restore(json.loads(state(first)))
        assert state(second) == state(first) == states[start + 20][0]
        assert rows(second, 20) == expected[start + 20 : start + 40]
        assert json.dumps(second.counts()) == (states[start + 40] if start + 40 < total else states[-1])[1]


def test_a_snapshot_is_not_changed_by_what_comes_after(tmp_path: Path) -> None:
    reference = stream(one_file(tmp_path, documents(50, longest=200)))
    rows(reference, 33)
    snapshot, saved, counts = reference.snapshot(), state(reference), reference.counts()
    rows(reference, 200)
    assert json.dumps(merge_states([snapshot.part()])) == saved
    assert merge_counts([snapshot.counts_part()]) == counts


def test_a_stream_of_other_shards_or_sources_is_not_continued(tmp_path: Path) -> None:
    source = one_file(tmp_path, documents(20))
    saved = json.loads(state(stream(source)))
    with pytest.raises(UserError, match="4 shards"):
        stream(source, shards=5).restore(saved)
    with pytest.raises(UserError, match="must be the same"):
        stream(replace(source, name="other")).restore(saved)


def test_a_copy_goes_on_for_itself_from_the_middle_of_a_document(tmp_path: Path) -> None:
    """What worker processes and simulated ranks get: nothing that one reads moves the other."""
    preparation = Preparation(min_characters=0, min_tokens=3, split_words=8, repair_text=False)
    reference = stream(one_file(tmp_path, documents(50, longest=200), "all.jsonl.gz"), preparation=preparation)
    rows(reference, 33)
    assert any(shard["opened"][0] and shard["opened"][0]["piece"] for shard in reference.state()["states"])
    copied, sent = copy(reference), pickle.loads(pickle.dumps(reference))
    saved = state(reference)
    expected = rows(copied, 200)
    assert state(reference) == state(sent) == saved
    assert rows(sent, 200) == rows(reference, 200) == expected
    assert state(sent) == state(copied) == state(reference)


def test_units_that_are_known_are_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = one_file(tmp_path, documents(50))
    first = stream(source)
    monkeypatch.setattr("openelm.data.stream.find_units", lambda source: pytest.fail("listed again"))
    again = stream(source, units=first.units)
    assert rows(again, 50) == rows(copy(first), 50) == rows(pickle.loads(pickle.dumps(first)), 50)


@pytest.mark.parametrize("shards", [1, 3, 5, 6, 8, 64])
def test_each_row_is_read_by_one_worker_of_its_rank_and_by_the_lowest_rank_that_answers(shards: int) -> None:
    for ranks in (1, 2, 3, 4, 7, 8, 12, 65):
        for workers in (1, 2, 5, 70):
            owners = {
                (rank, worker): set(owned_shards(shards, rank=rank, ranks=ranks, worker=worker, workers=workers))
                for rank in range(ranks)
                for worker in range(workers)
            }
            for k in range(shards * ranks):
                assert sum(k % shards in owners[k % ranks, worker] for worker in range(workers)) == 1
            for rank in range(ranks):
                of_rank = owned_shards(shards, rank=rank, ranks=ranks)
                assert set(of_rank) == {k % shards for k in range(rank, shards * ranks, ranks)}
                assert sum(len(owners[rank, worker]) for worker in range(workers)) == len(of_rank)


def test_parts_that_are_not_one_whole_state_are_not_merged(tmp_path: Path) -> None:
    reading = stream(one_file(tmp_path, documents(20)))
    even, odd = reading.snapshot([0, 2]).part(), reading.snapshot([1, 3]).part()
    rows(reading, 1)
    assert merge_states([odd, even])["states"][1] == odd["states"]["1"]
    for parts, problem in (
        ([even], r"no rank answers for shards \[1, 3\]"),
        ([even, odd, odd], "two ranks"),
        ([even, reading.snapshot([1, 3]).part()], "one position"),
    ):
        with pytest.raises(AssertionError, match=problem):
            merge_states(parts)
    with pytest.raises(AssertionError, match="whole"):
        reading.restore(even)


# What is served


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("count", "shards"), [(1, 1), (10, 3), (100, 4), (100, 64), (700, 64)])
def test_an_epoch_serves_each_document_exactly_once_over_all_shards(
    tmp_path: Path, layout: str, count: int, shards: int
) -> None:
    texts = documents(count)
    source = LAYOUTS[layout](tmp_path, texts)
    wanted = Counter({10 + i: 1 for i, text in enumerate(texts) if not is_held_out(text, 0.1)})
    reading = stream(source, shards=shards, held_out=0.1 if count > 10 else 0.0)
    if count <= 10:
        wanted = Counter(range(10, 10 + count))
    assert kept_first_ids(reading, 0) == wanted


def test_every_shard_has_a_share_of_small_files_fewer_than_fill_all_teams(tmp_path: Path) -> None:
    """A file of one record used to go to the first member of its team, and the others read everything, alone."""
    reading = stream(many_files(tmp_path, documents(100)), shards=64)
    rows(reading, 64 * 8)
    assert not any(state.places[0].alone for state in reading._states)


def test_a_later_epoch_serves_each_document_once_again_in_another_order(tmp_path: Path) -> None:
    texts = documents(120, shortest=3)
    for layout in LAYOUTS:
        source = LAYOUTS[layout](tmp_path / layout, texts)
        assert kept_first_ids(stream(source), 2).keys() == set(range(10, 130))
        reading = stream(source, shards=1, packing=Packing(1))
        ids = [id for row in rows(reading, 2 * sum(len(text.split()) + 2 for text in texts)) for id in row[1:]]
        order = [id for id in ids if 10 <= id < 130]
        assert sorted(order[:120]) == sorted(order[120:240]) == list(range(10, 130))
        assert order[:120] != order[120:240] != list(range(10, 130))
        assert reading.counts()["sources"][source.name]["epoch"] in (1, 2)


def test_documents_of_one_large_file_are_served_as_often_as_those_of_many_small_ones(tmp_path: Path) -> None:
    """The large file used to be dealt to one shard of many, which served it once while the others went round."""
    source = one_file(tmp_path, documents(2000, longest=5, first=10), "large.jsonl")
    many_files(tmp_path, documents(64, longest=5, first=5000))
    reading = stream(source, shards=16, packing=Packing(8))
    ids = Counter(id for row in rows(reading, 1500) for id in row[1:])
    large, small = (sum(ids[i] for i in range(a, a + n)) / n for a, n in ((10, 2000), (5000, 64)))
    assert small < 2 * large


def test_held_out_documents_are_never_served(tmp_path: Path) -> None:
    texts = documents(200)
    held = {10 + i for i, text in enumerate(texts) if is_held_out(text, 0.3)}
    assert 30 < len(held) < 90
    reading = stream(one_file(tmp_path, texts), held_out=0.3)
    served = {id for row in rows(reading, 1200) for id in row}
    assert not served & held
    assert served >= set(range(10, 210)) - held
    assert reading.counts()["held_out"] > 0


def test_packed_rows_of_a_shard_join_into_its_pieces_and_padded_ones_begin_each(tmp_path: Path) -> None:
    texts = documents(40, longest=90)
    source = one_file(tmp_path, texts)
    preparation = Preparation(min_characters=0, min_tokens=3, split_words=16, repair_text=False)
    pieces = {
        (BOS, *map(int, words[i : i + 16]), EOS)
        for words in (text.split() for text in texts)
        for i in range(0, len(words), 16)
    }
    ids: list[int] = []
    for row in rows(stream(source, shards=1, preparation=preparation, packing=Packing(7)), 200):
        assert not ids or ids[-1] == row[0]
        ids += row[1:] if ids else row
    joined = " ".join(map(str, ids)).split(f" {EOS} ")[:-1]
    assert len(joined) > 60
    assert all((*map(int, piece.split()), EOS) in pieces for piece in joined)
    padded = rows(stream(source, shards=3, preparation=preparation, packing=Packing(7, mode="pad")), 300)
    assert {tuple(row) for row in padded} <= {piece[:8] for piece in pieces}
    assert len({tuple(row) for row in padded}) == len({piece[:8] for piece in pieces})


@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_sources_are_mixed_by_valid_tokens_whatever_their_documents_lengths(tmp_path: Path, mode: str) -> None:
    """Chosen document by document, the source of long documents was some percent ahead in every shard at once."""
    long = replace(one_file(tmp_path / "a", documents(60, shortest=3000, longest=9000)), name="long", share=5)
    short = replace(one_file(tmp_path / "b", documents(900, longest=30)), name="short", share=3)
    rare = replace(one_file(tmp_path / "c", documents(300, shortest=100, longest=900)), name="rare", share=0.4)
    preparation = Preparation(min_characters=0, min_tokens=3, split_words=128, repair_text=False)
    reading = stream(long, short, rare, preparation=preparation, packing=Packing(64, mode=mode), shards=64)
    while reading.counts()["tokens"] < 600_000:
        rows(reading, 64)
    counts = reading.counts()
    shares = {name: entry["tokens"] / counts["tokens"] for name, entry in counts["sources"].items()}
    for source in (long, short, rare):
        assert abs(shares[source.name] - source.share / 8.4) < 0.01, shares


def test_a_source_without_a_share_is_not_read(tmp_path: Path) -> None:
    first = one_file(tmp_path / "a", documents(20))
    second = replace(one_file(tmp_path / "b", documents(20, first=500)), name="b", share=0.0)
    reading = stream(first, second)
    assert not {id for row in rows(reading, 200) for id in row} & set(range(500, 520))
    assert reading.counts()["sources"]["b"]["documents"] == 0


# The account


def test_every_document_is_accounted_for(tmp_path: Path) -> None:
    texts = documents(300, longest=40)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    lines += [b"not json", b'{"text": null}', b"[1]", b'{"text": "10 \xff"}', b'{"text": ""}'] * 4
    (tmp_path / "all.jsonl").write_bytes(b"\n".join(lines))
    source = Source("one", str(tmp_path), on_invalid_utf8="skip")
    preparation = Preparation(min_characters=40, min_tokens=10, split_words=10**9, repair_text=False)
    reading = stream(source, preparation=preparation, held_out=0.1, shards=3)
    kept_first_ids(reading, 0)
    counts = reading.counts()
    assert sum(counts[name] for name in FATES) == counts["documents"]
    totals = {name: sum(getattr(state.accounts[0], name) for state in reading._states) for name in FATES}
    assert totals == {name: counts[name] for name in FATES}
    # One epoch of every shard, and the first document of the next.
    by_hand: Counter[str] = Counter(undecodable=16, too_few_characters=4)
    for text in texts:
        if is_held_out(text, 0.1):
            by_hand["held_out"] += 1
        elif len(text) < 40:
            by_hand["too_few_characters"] += 1
        else:
            by_hand["kept" if len(text.split()) + 2 >= 10 else "too_few_tokens"] += 1
    assert all(by_hand[name] <= counts[name] <= by_hand[name] + 3 for name in FATES), (by_hand, counts)
    assert by_hand["too_few_tokens"] and by_hand["kept"]
    assert 4 <= counts["invalid_utf8"] <= 5


def test_a_document_is_kept_when_one_of_its_pieces_is_and_else_takes_the_first_reason(tmp_path: Path) -> None:
    source = one_file(tmp_path, ["10 1 1 1 1", "1 1 10 100 100", "1 1 1 1"])
    preparation = Preparation(min_characters=4, min_tokens=4, split_words=2, repair_text=False)
    reading = stream(source, preparation=preparation, shards=1, packing=Packing(2))
    while not reading._states[0].places[0].epoch:
        reading._read_piece(0)
    counts = reading.counts()
    # "10 1" has 4 characters; "1 1" has 3; "10 100" has 6.
    assert (counts["kept"], counts["too_few_characters"], counts["documents"]) == (2, 1, 3)
    assert (counts["pieces"], counts["tokens"], counts["bytes"]) == (2, 6, len("10 1") + len("10 100"))


def test_bytes_and_tokens_of_an_epoch_by_hand(tmp_path: Path) -> None:
    texts = documents(50)
    for mode, tokens in (("pack", lambda n: n + 1), ("pad", lambda n: min(n + 1, 16))):
        reading = stream(one_file(tmp_path, texts), shards=1, packing=Packing(16, mode=mode))
        while not reading._states[0].places[0].epoch:
            reading._read_piece(0)
        assert reading.counts()["bytes"] == sum(map(len, texts))
        assert reading.counts()["tokens"] == sum(tokens(len(text.split())) for text in texts)


# Too little data, and damaged data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_documents_feed_many_shards_each_in_an_order_of_its_own(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path, documents(2, shortest=20))
    reading = stream(source, shards=64, packing=Packing(8))
    served = rows(reading, 640)
    assert {10, 11} <= {id for row in served for id in row}
    assert all({row[0] for row in served[shard::64]} for shard in range(64))
    starts = Counter(row[1] for row in served[:64])
    assert starts.keys() == {10, 11} and min(starts.values()) > 10


@pytest.mark.parametrize("shards", [1, 4, 64])
def test_nothing_left_after_filtering_is_refused_with_the_counts(tmp_path: Path, shards: int) -> None:
    source = one_file(tmp_path, documents(20, longest=5))
    preparation = Preparation(min_characters=1000, min_tokens=3)
    with pytest.raises(UserError, match=r"'one'.*kept 0, too_few_characters \d+.*min_characters=1000"):
        stream(source, preparation=preparation, shards=shards).next_row()
    with pytest.raises(UserError, match=r"kept 0, too_few_characters 0, too_few_tokens \d+"):
        stream(source, preparation=Preparation(0, 1000), shards=shards).next_row()
    with pytest.raises(UserError, match=r"documents 20, kept 0, .* held_out 20\)"):
        stream(source, held_out=1.0, shards=1).next_row()


def test_an_empty_share_of_one_shard_is_not_an_empty_source(tmp_path: Path) -> None:
    texts = ["7"] * 30 + ["11 12 13 14 15 16 17 18"]
    source = one_file(tmp_path, texts)
    reading = stream(source, preparation=Preparation(0, 5, repair_text=False), shards=8)
    assert {tuple(sorted(set(row) - {BOS, EOS})) for row in rows(reading, 80)} == {tuple(range(11, 19))}
    assert sum(state.places[0].alone for state in reading._states) == 7


def corrupt_and_whole(folder: Path, on_corrupt: str) -> Source:
    texts = documents(400, longest=80)
    one_file(folder, texts[:200], "a.jsonl.gz")
    source = one_file(folder, texts[200:], "b.jsonl")
    damaged = (folder / "a.jsonl.gz").read_bytes()
    (folder / "a.jsonl.gz").write_bytes(damaged[: len(damaged) // 2])
    return replace(source, on_corrupt=on_corrupt)


def test_a_corrupt_file_stops_the_stream_and_is_named(tmp_path: Path) -> None:
    reading = stream(corrupt_and_whole(tmp_path, "stop"))
    with pytest.raises(CorruptFile, match=r"a\.jsonl\.gz"):
        rows(reading, 5000)
    with pytest.raises(CorruptFile, match=r"a\.jsonl\.gz"):
        rows(reading, 5000)


def test_a_corrupt_file_is_skipped_counted_once_and_resumed_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "BLOCK_RECORDS", 16)
    source = corrupt_and_whole(tmp_path / "here", "skip")
    reference = stream(source)
    expected, states = [], []
    for _ in range(60):
        states.append((state(reference), json.dumps(reference.counts())))
        expected += rows(reference, 40)
    assert reference.counts()["corrupt_files"] == 1
    served = {id for row in expected for id in row}
    assert served >= set(range(210, 410)) and served & set(range(10, 210))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for start in (0, 1, 7, 20, 45):
        resumed = stream(replace(source, path=str(tmp_path / "there")))
        resumed.restore(json.loads(states[start][0]))
        assert json.dumps(resumed.counts()) == states[start][1]
        assert rows(resumed, 400) == expected[start * 40 : start * 40 + 400]
        assert json.dumps(resumed.counts()) == states[start + 10][1]


# Cost


def test_shards_side_by_side_read_a_shared_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read = walk.read_records

    def counting(unit: Any, source: Source) -> Any:
        reads[unit.path] += 1
        return read(unit, source)

    monkeypatch.setattr(walk, "read_records", counting)
    reading = stream(one_file(tmp_path, documents(3000, shortest=20, longest=20)), shards=64)
    rows(reading, 3000 * 22 // 16 - 640)
    assert list(reads.values()) == [1]


def test_shards_with_files_of_their_own_read_each_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on in a file, shard after shard, used to open and read it from the start for every document."""
    reads: Counter[str] = Counter()
    read = walk.read_records

    def counting(unit: Any, source: Source) -> Any:
        reads[unit.path] += 1
        return read(unit, source)

    monkeypatch.setattr(walk, "read_records", counting)
    monkeypatch.setattr(walk, "BLOCK_RECORDS", 8)
    for number in range(64):
        one_file(tmp_path, documents(40, shortest=20, longest=20, seed=number), f"{number}.jsonl.gz")
    reading = stream(Source("files", str(tmp_path)), shards=16)
    assert reading.blocks[0].teams == 16
    rows(reading, 64 * 40 * 22 // 16 - 64)
    assert len(reads) == 64 and set(reads.values()) == {1}


def test_many_shards_of_many_files_are_dealt_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deals: list[int] = []
    deal = walk.deal
    monkeypatch.setattr(walk, "deal", lambda sizes, teams: deals.append(teams) or deal(sizes, teams))
    stream(many_files(tmp_path, documents(300)), shards=1024)
    assert len(deals) == 1


def test_deal_gives_each_unit_to_one_team_and_evens_out_their_sizes() -> None:
    sizes = [random.Random(i).randint(1, 1000) for i in range(100)]
    hands = walk.deal(sizes, 7)
    assert sorted(unit for hand in hands for unit in hand) == list(range(100))
    loads = [sum(sizes[unit] for unit in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes)


def test_shuffled_is_a_fixed_permutation() -> None:
    assert sorted(walk.shuffled(100, 1, "units")) == list(range(100))
    assert walk.shuffled(8, 1, "units", ("team", 0), 0) == walk.shuffled(8, 1, "units", ("team", 0), 0)
    assert walk.shuffled(20, 1) != walk.shuffled(20, 2) != list(range(20))
    assert Place() == Place(0, 0, 0, 0, False, 0)


@pytest.mark.slow  # ten million tokens, the shares that the requirement names
def test_shares_are_right_within_one_percent_after_ten_million_tokens(tmp_path: Path) -> None:
    draw = random.Random(5)
    specs = {
        "long": (0.5, 20_000, 1.0),
        "short": (0.3, 500, 0.5),
        "middle": (0.196, 2000, 0.7),
        "rare": (0.004, 8000, 1),
    }
    sources = []
    for name, (share, mean, sigma) in specs.items():
        lengths = [max(1, int(mean * draw.lognormvariate(-sigma * sigma / 2, sigma))) for _ in range(2_000_000 // mean)]
        texts = [" ".join(str(draw.randint(100, 999)) for _ in range(length)) for length in lengths]
        sources.append(replace(one_file(tmp_path / name, texts), name=name, share=share))
    preparation = Preparation(0, 3, 2048, repair_text=False)
    reading = stream(*sources, preparation=preparation, packing=Packing(2048), shards=64)
    while reading.counts()["tokens"] < 10_000_000:
        rows(reading, 64)
    counts = reading.counts()
    for name, (share, _, _) in specs.items():
        assert abs(counts["sources"][name]["tokens"] / counts["tokens"] - share) < 0.01


def test_a_tokenizer_whose_bos_is_its_eos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 100)

    class OneEnd:
        bos_id = eos_id = 2

        def encode(self, text: str) -> list[int]:
            return [3] * len(text)

    with pytest.raises(UserError, match="one id, 2, for the beginning and the end"):
        TokenStream([Source("a", str(tmp_path))], OneEnd(), Preparation(), Packing(8), seed=0, shards=1)
