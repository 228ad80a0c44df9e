"""The loader: the stream's own rows in order, its errors, and states that fit the steps they come with."""

import json
import threading
import time
from typing import Any

import pytest

from openelm.data.loader import Loader
from openelm.data.packing import Batch, Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import Source
from openelm.data.stream import TokenStream
from openelm.errors import UserError


class Letters:
    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    file = tmp_path_factory.mktemp("loader") / "all.jsonl"
    texts = [f"document {i} " * (1 + i % 40) for i in range(300)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source("all", str(file))


def stream(source: Source, min_characters: int = 0) -> TokenStream:
    preparation = Preparation(min_characters, 3, 5, repair_text=False)
    return TokenStream([source], Letters(), preparation, Packing(24), seed=4, shards=3)


def ids(batches: list[Batch]) -> list[Any]:
    return [batch.tokens.tolist() for batch in batches]


class Broken:
    """A stream that gives ``good`` steps and then fails."""

    def __init__(self, good: int, error: BaseException) -> None:
        self.left, self.error = good, error

    def next_batch(self, rows: int) -> Batch:
        if not self.left:
            raise self.error
        self.left -= 1
        return Packing(4).batch([], 1)

    def snapshot(self) -> int:
        return self.left

    def counts(self) -> dict[str, Any]:
        return {"left": self.left}


def test_steps_are_the_streams_rows_in_order(source: Source) -> None:
    plain = stream(source)
    with Loader(stream(source), rows=4, micro_batches=2, ahead=3) as loader:
        for step, _ in zip(loader, range(30), strict=False):
            assert ids(step.batches) == ids([plain.next_batch(4), plain.next_batch(4)])
            assert step.counts == plain.counts()
            assert step.wait_s >= 0


def test_the_state_that_comes_with_a_step_continues_with_the_next(source: Source) -> None:
    """The stream is ahead of what was asked for: its state of now would skip rows."""
    reference = stream(source)
    with Loader(reference, rows=3, micro_batches=2) as loader:
        steps = [step for step, _ in zip(loader, range(40), strict=False)]
        for number in range(0, 39, 5):
            saved = json.loads(json.dumps(reference.as_json(steps[number].snapshot)))
            resumed = stream(source)
            resumed.restore(saved)
            assert saved["position"] == 6 * (number + 1)
            assert resumed.counts() == steps[number].counts
            with Loader(resumed, rows=3, micro_batches=2) as again:
                for later, step in zip(steps[number + 1 :], again, strict=False):
                    assert ids(step.batches) == ids(later.batches)


def test_an_error_reaches_who_asks_for_the_step_that_it_spoils_and_again() -> None:
    loader = Loader(Broken(3, OSError("the disk is gone")), rows=1, micro_batches=1, ahead=2)
    with loader:
        steps = iter(loader)
        assert [next(steps).snapshot for _ in range(3)] == [2, 1, 0]
        with pytest.raises(OSError, match="the disk is gone"):
            next(steps)
        with pytest.raises(OSError, match="the disk is gone"):  # not an endless wait
            next(iter(loader))


def test_nothing_to_read_reaches_the_consumer_as_it_is(source: Source) -> None:
    with Loader(stream(source, min_characters=10**6), rows=2, micro_batches=1) as loader, pytest.raises(UserError):
        next(iter(loader))


def test_closing_ends_the_thread_full_queue_or_not(source: Source) -> None:
    before = threading.active_count()
    for wait_s in (0.0, 0.3):
        start_s = time.perf_counter()
        with Loader(stream(source), rows=2, micro_batches=2, ahead=1) as loader:
            next(iter(loader))
            time.sleep(wait_s)
        assert time.perf_counter() - start_s < 5
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


def test_it_does_not_run_further_ahead_than_asked(source: Source) -> None:
    reading = stream(source)
    with Loader(reading, rows=2, micro_batches=1, ahead=2) as loader:
        next(iter(loader))
        time.sleep(0.3)
        assert reading.position <= 2 * (1 + 2 + 1)  # taken, ready, and in hand
