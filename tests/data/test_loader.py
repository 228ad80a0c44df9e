"""The loader: the stream's own rows, whoever makes them, states that fit their steps, and workers that end."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openelm.data import loader as loader_module
from openelm.data.loader import Loader, Step
from openelm.data.packing import Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import CorruptFile, Source, Unit
from openelm.data.stream import TokenStream
from openelm.data.stream_state import merge_counts, merge_states
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError

# Divided by every number of ranks; more rows than shards, and not a multiple of them.
BATCH = 24
RANKS, WORKERS = (1, 2, 3, 4, 8), (0, 1, 2, 5)
WORDS = ["after", "all", "another", "before", "begin", "between", "children", "close", "country", "every", "people"]

# Rows by their number, as inputs and targets; a stream's state and account.
Rows = dict[int, tuple[list[int], list[int]]]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc")


class Letters:
    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of up to 200 words, in one file that all shards share, and in several compressed ones."""
    root = tmp_path_factory.mktemp("loader")
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 200))) for _ in range(300)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "all.jsonl").write_text("".join(lines[:200]))
    (root / "files").mkdir()
    for number in range(5):
        data = "".join(lines[200 + number :: 5]).encode()
        (root / "files" / f"{number}.jsonl.gz").write_bytes(gzip.compress(data))
    return root


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


@pytest.fixture(scope="module")
def stream(folder: Path, tokenizer: Tokenizer) -> Callable[..., TokenStream]:
    """``stream(shards=6, ...)``: two sources, pieces of 20 words, so that rows and pieces begin and end anywhere."""

    def make(shards: int = 6, row_length: int = 24, min_characters: int = 0, **options: Any) -> TokenStream:
        sources = [Source("one", str(folder / "all.jsonl")), Source("many", str(folder / "files"), share=0.4)]
        preparation = Preparation(min_characters, 8, 20, repair_text=False)
        packing = options.pop("packing", Packing(row_length))
        return TokenStream(sources, tokenizer, preparation, packing, seed=4, shards=shards, held_out=0.1, **options)

    return make


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers as threads, several of them too: a process each takes a quarter of a second to start."""
    link = loader_module._Link
    monkeypatch.setattr(loader_module, "_Link", lambda stream, plan, process: link(stream, plan, process=False))


def take(loader: Loader, steps: int) -> list[Step]:
    return list(islice(loader, steps))


def rows_of(step: Step, rank: int, ranks: int) -> Rows:
    """A rank's rows of a step, by their numbers."""
    numbers = (k for k in range(step.first_row, 10**9) if k % ranks == rank)
    return {
        next(numbers): (tokens, targets)
        for batch in step.batches
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    }


def run(
    start: TokenStream, steps: int, ranks: int, workers: int, batch: int = BATCH, rows: int = 1
) -> tuple[Rows, dict[str, Any], dict[str, Any]]:
    """What all ranks get, one after the other, and their parts of the last step's state and account as one."""
    found: Rows = {}
    states, counts = [], []
    for rank in range(ranks):
        with Loader(start, global_batch=batch, rows=rows, rank=rank, ranks=ranks, workers=workers) as loader:
            for number, step in enumerate(take(loader, steps)):
                assert step.first_row == start.position + number * batch
                assert [len(each.tokens) for each in step.batches] == [rows] * (batch // ranks // rows)
                found |= rows_of(step, rank, ranks)
            states.append(json.loads(json.dumps(step.state())))
            counts.append(json.loads(json.dumps(step.counts())))
    return found, merge_states(states), merge_counts(counts)


def expected(plain: TokenStream, count: int) -> Rows:
    """The next rows of a stream, read by nobody else."""
    first = plain.position
    batches = [plain.next_batch(1) for _ in range(count)]
    return {first + i: (batch.tokens[0].tolist(), batch.targets[0].tolist()) for i, batch in enumerate(batches)}


# The same rows for any number of ranks and workers


@pytest.mark.parametrize("shards", [1, 3, 6])
@pytest.mark.parametrize("ranks", RANKS)
def test_rows_states_and_accounts_are_those_of_the_stream(
    stream: Callable[..., TokenStream], threads: None, ranks: int, shards: int
) -> None:
    plain = stream(shards)
    rows = expected(plain, 4 * BATCH)
    for workers in WORKERS:
        assert run(stream(shards), 4, ranks, workers) == (rows, plain.state(), plain.counts()), workers


@pytest.mark.parametrize(("ranks", "workers"), [(1, 5), (3, 2)])
def test_processes_give_the_same_rows(stream: Callable[..., TokenStream], ranks: int, workers: int) -> None:
    plain = stream()
    rows = expected(plain, 6 * BATCH)
    assert run(stream(), 6, ranks, workers, rows=4) == (rows, plain.state(), plain.counts())


@pytest.mark.parametrize(("batch", "mode"), [(8, "pack"), (40, "pad")])
def test_batches_smaller_than_the_shards_leave_nothing_out(
    stream: Callable[..., TokenStream], threads: None, batch: int, mode: str
) -> None:
    """A worker may have no row in a step."""
    for shards in (11, 30):
        plain = stream(shards, packing=Packing(24, mode=mode))
        rows = expected(plain, 7 * batch)
        for ranks, workers in ((1, 5), (4, 2), (8, 3)):
            found = run(stream(shards, packing=Packing(24, mode=mode)), 7, ranks, workers, batch=batch)
            assert found == (rows, plain.state(), plain.counts())


def test_two_resumes_in_mid_document_on_other_ranks_and_workers_change_nothing(
    stream: Callable[..., TokenStream], threads: None
) -> None:
    for phases in (((1, 0), (3, 2), (2, 5)), ((8, 1), (1, 5), (4, 2)), ((4, 5), (8, 0), (3, 1))):
        plain, reading = stream(), stream()
        for ranks, workers in phases:
            rows = expected(plain, 5 * BATCH)
            found, state, counts = run(reading, 5, ranks, workers)
            assert (found, state, counts) == (rows, plain.state(), plain.counts())
            assert state["position"] == plain.position
            assert any(opened and opened["piece"] for shard in state["states"] for opened in shard["opened"])
            reading = stream()
            reading.restore(state)
            assert reading.counts() == counts


def test_rows_do_not_depend_on_how_far_the_loader_is_ahead(stream: Callable[..., TokenStream]) -> None:
    plain, found = stream(), []
    for ahead in (1, 2, 7):
        with Loader(stream(), global_batch=8, rows=4, ahead=ahead) as loader:
            found.append([rows_of(step, 0, 1) for step in take(loader, 10)])
    assert found[0] == found[1] == found[2] == [expected(plain, 8) for _ in range(10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_behind_every_step_is_the_streams_though_workers_are_ahead(
    stream: Callable[..., TokenStream], workers: int
) -> None:
    plain = stream()
    with Loader(stream(), global_batch=10, rows=5, workers=workers, ahead=3) as loader:
        for number, step in enumerate(take_slowly(loader, 12)):
            assert rows_of(step, 0, 1) == expected(plain, 10)
            assert merge_states([step.state()]) == plain.state(), number
            assert merge_counts([step.counts()]) == plain.counts(), number
            assert step.wait_s >= 0


def take_slowly(loader: Loader, steps: int) -> Iterator[Step]:
    for number, step in enumerate(islice(loader, steps)):
        time.sleep(0.1 if number < 3 else 0)
        yield step


def test_a_corrupt_file_is_counted_once_whoever_meets_it(
    folder: Path, stream: Callable[..., TokenStream], threads: None, tmp_path: Path
) -> None:
    for name in ("0.jsonl.gz", "1.jsonl.gz"):
        data = (folder / "files" / name).read_bytes()
        (tmp_path / name).write_bytes(data if name[0] == "1" else data[: len(data) // 2])
    made = stream()
    source = Source("cut", str(tmp_path), on_corrupt="skip")
    fresh = TokenStream([source], made.tokenizer, made.preparation, made.packing, seed=4, shards=6)
    plain = copy(fresh)
    rows = expected(plain, 20 * BATCH)
    assert plain.counts()["corrupt_files"] == 1
    for ranks, workers in ((1, 5), (3, 2), (8, 0)):
        assert run(fresh, 20, ranks, workers) == (rows, plain.state(), plain.counts())


def test_it_does_not_run_further_ahead_than_asked_and_leaves_the_stream_where_it_is(
    stream: Callable[..., TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    next_of = TokenStream.next_of
    monkeypatch.setattr(TokenStream, "next_of", lambda self, shard: made.append(shard) or next_of(self, shard))
    # A step of 1.5 MB is more than a pipe holds.
    given = stream(row_length=4096)
    before = given.state()
    with Loader(given, global_batch=96, rows=96, ahead=2) as loader:
        deadline_s = time.monotonic() + 20
        while len(made) < 2 * 96 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(0.2)
        assert len(made) == 2 * 96
        next(iter(loader))
        while len(made) < 3 * 96 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(0.2)
        assert len(made) == 3 * 96
    assert given.state() == before


def test_the_state_of_a_step_is_gone_with_the_next_one(stream: Callable[..., TokenStream]) -> None:
    with Loader(stream(), global_batch=4, rows=4) as loader:
        first, second = take(loader, 2)
        with pytest.raises(AssertionError, match="gone"):
            first.state()
        assert second.state()["position"] == 8
    with pytest.raises(RuntimeError, match="closed"):
        second.state()


# Errors


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_read_is_the_users_error_in_the_ranks_process(
    stream: Callable[..., TokenStream], workers: int
) -> None:
    with Loader(stream(min_characters=10**6), global_batch=4, rows=2, workers=workers) as loader:
        for _ in range(2):  # not an endless wait the second time
            with pytest.raises(UserError, match=r"is left after filtering \(.*min_characters=1000000") as caught:
                next(iter(loader))
            assert "In data worker 1 of" in caught.value.__notes__[0] and "_find" in caught.value.__notes__[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_spoils_its_own_step_and_no_earlier_one_nor_its_state(
    folder: Path, stream: Callable[..., TokenStream], tmp_path: Path, workers: int
) -> None:
    for file in (folder / "files").iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.name[0] == "4" else data)
    made = stream()
    source = Source("cut", str(tmp_path))
    # Of this seed, the damaged file is neither the first nor the last.
    fresh = TokenStream([source], made.tokenizer, made.preparation, made.packing, seed=2, shards=2)
    plain, good = copy(fresh), 0
    with pytest.raises(CorruptFile), Loader(fresh, global_batch=16, rows=16, workers=workers, ahead=5) as loader:
        for step in loader:
            assert rows_of(step, 0, 1) == expected(plain, 16)
            time.sleep(0.05)  # for the worker to meet the damage, far ahead
            assert merge_states([step.state()]) == plain.state()
            good += 1
    with pytest.raises(CorruptFile, match=r"4\.jsonl\.gz"):
        expected(plain, 16)
    assert good > 5


class Odd(Exception):  # noqa: N818
    """It cannot be put together again behind a pipe."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Failing(Letters):
    def encode(self, text: str) -> list[int]:
        raise Odd("this", "that")


def test_an_error_that_cannot_travel_is_told_by_its_name(stream: Callable[..., TokenStream]) -> None:
    broken = copy(stream())
    broken.tokenizer = Failing()
    with Loader(broken, global_batch=4, rows=4) as loader, pytest.raises(RuntimeError, match="Odd: this and that"):
        next(iter(loader))


# How workers end


def pids(loader: Loader) -> list[int]:
    return [link._host.pid for link in loader._links]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_files(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def wait_until(fact: Callable[[], bool], seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while not fact() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return fact()


def test_a_killed_worker_is_named_and_nobody_waits_for_it(stream: Callable[..., TokenStream]) -> None:
    with Loader(stream(), global_batch=12, rows=4, workers=2) as loader:
        next(iter(loader))
        os.kill(pids(loader)[1], signal.SIGKILL)
        start_s = time.monotonic()
        with pytest.raises(RuntimeError, match=r"data worker 2 of 2 died \(SIGKILL\).*data\.workers"):
            take(loader, 10)
        with pytest.raises(RuntimeError, match="data worker 2 of 2 died"):
            next(iter(loader))
        assert time.monotonic() - start_s < 5


def test_workers_leave_a_runs_signals_to_their_rank(stream: Callable[..., TokenStream]) -> None:
    plain = stream()
    with Loader(stream(), global_batch=12, rows=12, workers=2) as loader:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for pid in pids(loader):  # the first one while they start
                os.kill(pid, number)
            assert [rows_of(step, 0, 1) for step in take(loader, 4)] == [expected(plain, 12) for _ in range(4)]


@linux
def test_a_worker_starts_without_torch(stream: Callable[..., TokenStream]) -> None:
    with Loader(stream(), global_batch=12, rows=12, workers=1) as loader:
        next(iter(loader))
        loaded = Path(f"/proc/{pids(loader)[0]}/maps").read_text()
    assert "numpy" in loaded and "libtorch" not in loaded


def blocked(made: TokenStream, folder: Path) -> TokenStream:
    """A stream that waits for ever, inside the opening of a file."""
    path = str(folder / "pipe")
    if not Path(path).exists():
        os.mkfifo(path)
    units = [[Unit(path, "text", size_bytes=10)]]
    source = replace(made.sources[0], path=path)
    return TokenStream([source], made.tokenizer, made.preparation, made.packing, seed=1, shards=1, units=units)


@linux
def test_closing_ends_workers_whatever_they_do_and_leaves_no_file_open(
    stream: Callable[..., TokenStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loader(stream(), global_batch=4, rows=4, workers=1):  # Python's own helper for spawned processes starts
        pass
    before = open_files(), threading.active_count()
    # Blocked in sending 1.5 MB, in waiting to be allowed more, and still starting.
    for given, batch, wait_s in ((stream(row_length=4096), 96, 0.6), (stream(), 4, 0.4), (stream(), 4, 0.0)):
        for workers in (0, 2):
            with Loader(given, global_batch=batch, rows=4, workers=workers) as loader:
                started = pids(loader) if workers else []
                time.sleep(wait_s)
                start_s = time.monotonic()
            assert time.monotonic() - start_s < 4
            assert not any(map(is_running, started))
            assert (open_files(), threading.active_count()) == before
    # Blocked in a system call: nothing but killing helps.
    monkeypatch.setattr(loader_module, "_CLOSING_S", 0.3)
    with Loader(blocked(stream(), tmp_path), global_batch=4, rows=4, workers=1) as loader:
        started = pids(loader)
        time.sleep(0.7)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 2
    assert not any(map(is_running, started))
    assert (open_files(), threading.active_count()) == before


def test_closing_does_not_wait_for_a_thread_that_nothing_can_end(
    stream: Callable[..., TokenStream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_CLOSING_S", 0.3)
    with Loader(blocked(stream(), tmp_path), global_batch=4, rows=4) as loader:
        thread = loader._links[0]._host
        time.sleep(0.2)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 2
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))
    with (tmp_path / "pipe").open("w") as file:  # what it waits for comes: it ends by itself
        file.write(" ".join(WORDS * 20))
    thread.join(5)
    assert not thread.is_alive()


PROGRAM = """
import sys, time
from openelm.data.loader import Loader
from openelm.data.packing import Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import Source, Unit
from openelm.data.stream import TokenStream
from openelm.data.tokenizer import Tokenizer

text, tokenizer, blocked, then = sys.argv[1:]
units = [[Unit(blocked, "text", size_bytes=10)]] if blocked else None
stream = TokenStream(
    [Source("text", text)], Tokenizer.load(tokenizer), Preparation(0, 8), Packing(64), seed=1, shards=4, units=units
)
loader = Loader(stream, global_batch=4, rows=4, workers=2)
if not blocked:
    next(iter(loader))
print(*(link._host.pid for link in loader._links), flush=True)
if then == "wait":
    time.sleep(60)
elif then == "fail":
    raise ValueError("on purpose")
"""


def program(folder: Path, tokenizer_file: Path, blocked: str, then: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, str(folder / "all.jsonl"), str(tokenizer_file), blocked, then]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@linux
def test_workers_leave_when_their_rank_was_killed_even_in_the_middle_of_reading(
    folder: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for blocked_at in ("", str(tmp_path / "pipe")):
        process = program(folder, tokenizer_file, blocked_at, "wait")
        assert process.stdout
        workers = [int(word) for word in process.stdout.readline().split()]
        time.sleep(0.7 if blocked_at else 0)
        assert len(workers) == 2 and all(map(is_running, workers))
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(is_running, workers)), 2)  # noqa: B023
        process.communicate()


@pytest.mark.parametrize(("then", "code"), [("end", 0), ("fail", 1)])
def test_a_program_that_closes_nothing_ends_all_the_same(
    folder: Path, tokenizer_file: Path, then: str, code: int
) -> None:
    """Python waits for worker processes at its end, and they would wait for it."""
    process = program(folder, tokenizer_file, "", then)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert ("on purpose" in err) if code else err == ""
    assert wait_until(lambda: not any(is_running(int(word)) for word in out.split()), 2)


# Large counts


@pytest.mark.slow  # ten thousand rows of each of twenty ways, by real processes: some minutes
def test_ten_thousand_rows_are_the_same_for_twenty_combinations(stream: Callable[..., TokenStream]) -> None:
    from openelm.data.row_hashes import row_hashes

    steps = -(-10_000 // BATCH)
    plain = stream(40)
    rows = expected(plain, steps * BATCH)
    hashes = row_hashes(stream(40), 10_000)
    for ranks in RANKS:
        for workers in WORKERS:
            found = run(stream(40), steps, ranks, workers)
            assert found == (rows, plain.state(), plain.counts()), (ranks, workers)
            assert row_hashes(stream(40), 10_000, ranks, max(1, workers)) == hashes
    # Two resumes in mid-document, with other ranks and workers.
    reading, plain = stream(40), stream(40)
    for ranks, workers, part in ((4, 2, 131), (3, 5, 140), (8, 1, 146)):
        found, state, counts = run(reading, part, ranks, workers)
        assert (found, state, counts) == (expected(plain, part * BATCH), plain.state(), plain.counts())
        assert any(opened and opened["piece"] for shard in state["states"] for opened in shard["opened"])
        reading = stream(40)
        reading.restore(state)


@linux
@pytest.mark.slow  # ten thousand steps, after which nothing may have grown
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_and_open_files_stay_flat_over_ten_thousand_steps(
    stream: Callable[..., TokenStream], workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def resident_bytes(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    figures = []
    with Loader(stream(row_length=256), global_batch=16, rows=8, workers=workers) as loader:
        watched = ["self", *(pids(loader) if workers else [])]
        for number, step in enumerate(islice(loader, 10_001)):
            if number % 100 == 0:
                merge_states([step.state()])
                merge_counts([step.counts()])
            if number % 1000 == 0:
                files = [open_files(pid) for pid in watched]
                figures.append(([resident_bytes(pid) / 2**20 for pid in watched], files))
    with capsys.disabled():
        for number, (resident, files) in enumerate(figures):
            print(f"step {number * 1000:>6}: resident MiB {np.round(resident, 1).tolist()}, open files {files}")
    for i in range(len(watched)):
        # The first thousand fill what is kept: blocks, and the allocator's own.
        assert max(r[i] for r, _ in figures[2:]) < 1.03 * figures[1][0][i]
        assert max(f[i] for _, f in figures[1:]) <= figures[1][1][i] + 1  # a file that is being read
