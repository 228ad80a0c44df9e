"""Steps of rows made ahead of time, by a thread or by worker processes, on any number of ranks.

A rank reads the shards that hold its rows, each of its workers some of them: ``owned_shards`` says which. A worker
sits behind a pipe, whether it is a thread or a process. It sends the rows of one step after another, as many ahead as
it may, or the error that spoils a step. The rank says which step was taken, and asks at times for the state behind
it; that costs nothing before it is asked for, since the records that the stream keeps of its shards never change.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import gcd
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any, NamedTuple

from openelm.data.packing import Batch, Ids
from openelm.data.stream import TokenStream, owned_shards
from openelm.data.stream_state import Snapshot, joined

# A fork would copy the locks of torch's threads as they happen to be; a spawned worker also starts without torch.
_SPAWN = multiprocessing.get_context("spawn")
# What ends a run, or asks it for a checkpoint, is sent to all its processes; the rank's own answers.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_CLOSING_S = 2.0  # after which a worker that is still busy is killed, and a thread left to end by itself


@dataclass(frozen=True)
class Step:
    """This rank's batches of one step, and how long they were waited for.

    ``state`` and ``counts`` are to be asked for before the next step is taken.
    """

    batches: list[Batch]
    first_row: int = 0  # of the step, over all ranks
    wait_s: float = 0.0
    snapshot: Callable[[], Snapshot] = lambda: Snapshot(0, 0, ())

    def state(self) -> dict[str, Any]:
        """The stream's state behind this step, as far as this rank answers for it: a part for ``merge_states``."""
        return self.snapshot().part()

    def counts(self) -> dict[str, Any]:
        """The account of the documents up to this step, likewise: a part for ``merge_counts``."""
        return self.snapshot().counts_part()


class Loader:
    """The steps of ``stream`` from where it stands: ``global_batch`` rows over all ``ranks``, of which this one gets
    its own in batches of ``rows``.

    ``ahead`` steps are prepared in the background, by a thread or, with ``workers``, by so many processes. The stream
    itself stays where it is. An error of a worker is raised to whoever asks for the step that it spoils. Use it with
    ``with``: leaving ends the thread or the processes, whatever they are doing.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        global_batch: int,
        rows: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        ahead: int = 2,
    ) -> None:
        assert global_batch % (ranks * rows) == 0, f"{global_batch} rows are not whole batches of {rows} on {ranks}"
        assert 0 <= rank < ranks and workers >= 0 and ahead >= 1
        own = owned_shards(stream.shards, rank=rank, ranks=ranks)
        readers = min(max(1, workers), len(own))  # more would have nothing to read
        plans = [
            _Plan(stream.shards, global_batch, stream.position, rank, ranks, worker, readers, ahead)
            for worker in range(readers)
        ]
        self._plan, self._rows = plans[0], rows
        self._packing, self._bos_id = stream.packing, stream.tokenizer.bos_id
        self._nothing = stream.snapshot([])
        self._worker_of = {shard: plan.worker for plan in plans for shard in plan.own_shards()}
        self._taken = 0
        self._error: BaseException | None = None
        self._links: list[_Link] = []
        # Also at the end of the program, before it would wait for processes that wait for it.
        self._shut = Finalize(self, _shut, args=(self._links,), exitpriority=10)
        try:
            for plan in plans:
                self._links.append(_Link(stream, plan, process=workers > 0))
            data = bytes(ForkingPickler.dumps(stream)) if workers else b""  # once for all, while they start
            for link in self._links:
                link.begin(data)
        except BaseException:
            self._shut()
            raise

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield self._next()

    def _next(self) -> Step:
        start_s = time.perf_counter()
        self._check_open()
        if self._error:
            raise self._error
        try:
            made = [link.take_rows() for link in self._links]
        except BaseException as error:
            self._error = error  # for whoever asks again: nothing else will come
            raise
        step, plan = self._taken, self._plan
        self._taken += 1
        for link in self._links:
            link.tell("taken", step)
        rows = [next(made[self._worker_of[k % plan.shards]]) for k in plan.rows_of(step) if k % plan.ranks == plan.rank]
        starts = range(0, len(rows), self._rows)
        batches = [self._packing.batch(rows[i : i + self._rows], self._bos_id) for i in starts]
        snapshot = partial(self._snapshot, step)
        return Step(batches, plan.rows_of(step).start, time.perf_counter() - start_s, snapshot)

    def _snapshot(self, step: int) -> Snapshot:
        """The shards for which no lower rank answers, right behind a step."""
        self._check_open()
        assert step == self._taken - 1, "the state behind a step is gone once the next one is taken"
        if self._plan.rank >= gcd(self._plan.ranks, self._plan.shards):
            return replace(self._nothing, position=self._plan.rows_of(step).stop)
        for link in self._links:
            link.tell("state", step)
        return joined([link.take("state") for link in self._links])

    def _check_open(self) -> None:
        if not self._shut.still_active():
            raise RuntimeError("the loader is closed")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._shut()


@dataclass(frozen=True)
class _Plan:
    """Which rows of each step a worker reads, and which of them it hands over."""

    shards: int
    global_batch: int
    first_row: int
    rank: int
    ranks: int
    worker: int
    workers: int
    ahead: int

    def own_shards(self) -> range:
        return owned_shards(self.shards, rank=self.rank, ranks=self.ranks, worker=self.worker, workers=self.workers)

    def rows_of(self, step: int) -> range:
        """Of all ranks."""
        first = self.first_row + step * self.global_batch
        return range(first, first + self.global_batch)


class _Failure(NamedTuple):
    """An error on its way to the rank; ``pickled`` is None where it cannot travel."""

    pickled: bytes | None
    text: str
    trace: str

    @staticmethod
    def of(error: BaseException) -> _Failure:
        pickled = None
        with suppress(Exception):
            pickled = bytes(ForkingPickler.dumps(error))
        return _Failure(pickled, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))

    def error(self) -> BaseException:
        with suppress(Exception):
            # Some exceptions travel and cannot be put together again.
            found = ForkingPickler.loads(self.pickled) if self.pickled else None
            if isinstance(found, BaseException):
                return found
        return RuntimeError(self.text)


# The worker's side


class _Left(Exception):  # noqa: N818 (a fact, not an error)
    """The rank has closed its end of the pipe."""


class _Worker:
    """Makes the rows of its plan, in order, until the pipe is closed."""

    def __init__(self, connection: Connection, stream: TokenStream, plan: _Plan) -> None:
        self._connection, self._stream, self._plan = connection, stream, plan
        self._allowed = plan.ahead  # steps that may be made
        self._snapshots: dict[int, Snapshot] = {}  # behind the steps that may still be asked for
        # The pipe holds less than the rows of a large step: who sends waits, and must not keep the next step waiting.
        self._outbox: SimpleQueue[tuple[str, Any] | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="data-sender", daemon=True)

    def serve(self) -> None:
        """Steps as they are allowed, states as they are asked for; behind an error, states only."""
        with self._connection:
            self._sender.start()
            with suppress(_Left):
                self._serve()
            self._outbox.put(None)
            self._sender.join()

    def _serve(self) -> None:
        for step in count():
            while step >= self._allowed:
                self._listen()
            try:
                self._outbox.put(("rows", self._make(step)))
            except _Left:
                raise
            except BaseException as error:
                self._outbox.put(("rows", _Failure.of(error)))
                break
        while True:
            self._listen()

    def _make(self, step: int) -> list[Ids]:
        stream, plan = self._stream, self._plan
        own, kept = plan.own_shards(), []
        for k in plan.rows_of(step):
            shard = k % plan.shards
            if shard in own:
                while self._is_told():  # neither closing nor a checkpoint waits for a whole step
                    self._listen()
                row = stream.next_of(shard)
                if k % plan.ranks == plan.rank:
                    kept.append(row)
        stream.position = plan.rows_of(step).stop
        self._snapshots[step] = stream.snapshot(own)
        return kept

    def _is_told(self) -> bool:
        try:
            return self._connection.poll()
        except OSError:
            raise _Left from None

    def _listen(self) -> None:
        """Wait for one message, and do what it says."""
        try:
            kind, step = self._connection.recv()
        except (EOFError, OSError):
            raise _Left from None
        if kind == "taken":
            self._allowed = step + 1 + self._plan.ahead
            self._snapshots = {key: value for key, value in self._snapshots.items() if key >= step}
        else:
            self._outbox.put(("state", self._snapshots[step]))

    def _send(self) -> None:
        with suppress(OSError):  # the pipe is closed, which the other thread hears
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)


def _in_process(connection: Connection, plan: _Plan) -> None:
    """What a worker process does: the stream comes through the pipe."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        stream = connection.recv()
    except (EOFError, OSError):
        return  # the loader is closed already
    except Exception as error:
        connection.send(("rows", _Failure.of(error)))
        return
    _Worker(connection, stream, plan).serve()


def _leave_with_parent() -> None:
    """End this process when the rank's has ended, however, and whatever this one is reading."""
    parent = multiprocessing.parent_process()
    # Its pipe may be held open by another child of it; that this one was adopted cannot be hidden.
    while parent and parent.is_alive() and os.getppid() == parent.pid:
        parent.join(0.5)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


# The rank's side


class _Link:
    """The rank's end of the pipe to one worker: a thread, or a process, which waits for the stream.

    A thread is enough for one: decompression, tokenisation and the model all leave Python's lock alone.
    """

    def __init__(self, stream: TokenStream, plan: _Plan, *, process: bool) -> None:
        self.name = f"data worker {plan.worker + 1} of {plan.workers}"
        self.connection, theirs = _SPAWN.Pipe()
        self._held: dict[str, deque[Any]] = {"rows": deque(), "state": deque()}
        self._host: SpawnProcess | threading.Thread
        if process:
            self._host = _SPAWN.Process(target=_in_process, args=(theirs, plan), name=self.name, daemon=True)
            with _signals_held(), theirs:
                self._host.start()
        else:
            serve = _Worker(theirs, copy(stream), plan).serve
            self._host = threading.Thread(target=serve, name=self.name, daemon=True)
            self._host.start()

    def begin(self, stream: bytes) -> None:
        """Give a process its stream."""
        if not isinstance(self._host, threading.Thread):
            with suppress(OSError):  # it has died already: said when its rows are asked for
                self.connection.send_bytes(stream)

    def take(self, kind: str) -> Any:
        """The next message of one kind; those of the other are kept."""
        while not self._held[kind]:
            try:
                got, content = self.connection.recv()
            except (EOFError, OSError):
                raise self._death() from None
            self._held[got].append(content)
        return self._held[kind].popleft()

    def take_rows(self) -> Iterator[Ids]:
        """This worker's rows of the next step, or the error that it met."""
        made: list[Ids] | _Failure = self.take("rows")
        if isinstance(made, _Failure):
            error = made.error()
            error.add_note(f"In {self.name}:\n{made.trace}")
            raise error
        return iter(made)

    def tell(self, kind: str, step: int) -> None:
        with suppress(OSError):  # it has died: said once what it sent before is used up
            self.connection.send((kind, step))

    def _death(self) -> RuntimeError:
        self._host.join(_CLOSING_S)
        code = getattr(self._host, "exitcode", None)
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        return RuntimeError(
            f"{self.name} died ({how}): without its rows the run cannot go on: resume it, with fewer data.workers if "
            "the machine ran out of memory"
        )

    def end(self, until_s: float) -> None:
        """Wait for the worker, whose pipe is closed, up to a time of ``time.monotonic``; a process is then killed."""
        self._host.join(max(0.0, until_s - time.monotonic()))
        if not isinstance(self._host, threading.Thread):
            self._host.kill()
            self._host.join()
            self._host.close()


def _shut(links: list[_Link]) -> None:
    for link in links:
        link.connection.close()
    until_s = time.monotonic() + _CLOSING_S
    for link in links:
        link.end(until_s)


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process started meanwhile never sees the signals of a run, not even before it can say that it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
