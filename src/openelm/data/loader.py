"""Batches made ahead of time, in a thread: SentencePiece, decompression and the model all leave Python's lock alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openelm.data.packing import Batch
from openelm.data.stream import TokenStream


@dataclass(frozen=True)
class Step:
    """The batches of one step, the stream's state behind them, its account, and how long they were waited for."""

    batches: list[Batch]
    snapshot: Any
    counts: dict[str, Any]
    wait_s: float = 0.0


class Loader:
    """Steps of ``micro_batches`` batches of ``rows`` rows, ``ahead`` of them prepared in the background.

    An error of the stream is raised to whoever asks for the step that it spoils. Close it, or use it with ``with``.
    """

    def __init__(self, stream: TokenStream, *, rows: int, micro_batches: int, ahead: int = 2) -> None:
        self._stream, self._rows, self._micro_batches = stream, rows, micro_batches
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="token-stream", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        while not self._stop.is_set():
            item: Step | BaseException
            try:
                batches = [self._stream.next_batch(self._rows) for _ in range(self._micro_batches)]
                item = Step(batches, self._stream.snapshot(), self._stream.counts())
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def __iter__(self) -> Iterator[Step]:
        while True:
            start_s = time.perf_counter()
            if self._stop.is_set():
                raise RuntimeError("the loader is closed")
            item = self._ready.get()
            if isinstance(item, BaseException):
                self._ready.put(item)  # for whoever asks again: nothing else will come
                raise item
            yield Step(item.batches, item.snapshot, item.counts, time.perf_counter() - start_s)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
